"""virtio 1.2: the split virtqueue and the devices, which know neither the bus nor the CPU they are used with."""
