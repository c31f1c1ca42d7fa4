"""Metal kernels: sources, wrappers and the emulator."""
