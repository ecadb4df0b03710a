"""Answering requests: from the bytes that come to the bytes that go."""
