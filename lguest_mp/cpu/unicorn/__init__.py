"""The embedded CPU: Unicorn 2.1.4, taught to run a whole machine."""
