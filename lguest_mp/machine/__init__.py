"""The machines: what a guest finds when it looks around."""
