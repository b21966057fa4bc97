"""What holds for all tests and the processes that they start."""

import os

# oneDNN's AMX kernels (torch 2.14) leave the weight gradient of a bf16 3 x 3 convolution on 1 x 1 maps unwritten: NaN,
# on machines that have AMX. Read when the first kernel is made, so set before torch is used.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
