"""The prediction log: what was answered and told, and where it is kept."""
