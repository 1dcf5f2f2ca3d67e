"""The buses: how a guest finds its devices and talks to them."""
