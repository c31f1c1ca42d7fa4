"""Runs Metal kernels on a CPU, in lockstep, and finds their faults."""

from localllm.kernels_metal.emulator.counters import Counters
from localllm.kernels_metal.emulator.emulator import Dispatch, Emulator
from localllm.kernels_metal.emulator.faults import KernelFault

__all__ = ["Counters", "Dispatch", "Emulator", "KernelFault"]
