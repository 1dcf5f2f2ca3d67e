"""The host's ``/dev/kvm`` as an engine: the guest's instructions are executed by the host's processor itself."""
