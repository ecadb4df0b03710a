"""Serving (C8): the endpoint on Ray Serve, batch scoring on Ray Data, the client."""
