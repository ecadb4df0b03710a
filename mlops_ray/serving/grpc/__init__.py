"""The Open Inference Protocol over gRPC, by Ray Serve's gRPC ingress."""
