"""python -m localllm.kernels_metal.emulator"""

import sys

from localllm.kernels_metal.emulator.command import main

sys.exit(main())
