"""The closed loop (P9): trigger policy, controller, replay."""
