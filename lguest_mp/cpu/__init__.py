"""The CPU engines: what executes the guest's instructions."""
