"""What a guest's network device is plugged into, on the host: a tap, a wire between guests, or a user's own network."""
