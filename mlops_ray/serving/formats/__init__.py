"""What requests and answers look like: JSON, Arrow, tensors, the Open Inference Protocol."""
