"""Runs Metal kernels on a CPU, in lockstep, and finds their faults."""

from localllm.kernels_metal.emulator.emulator import Dispatch, Emulator, KernelFault

__all__ = ["Dispatch", "Emulator", "KernelFault"]
