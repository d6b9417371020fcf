"""The compiled kernels, one module per instruction-set level (built by tools/build_kernels.py).

ENGINE_KERNELS names another folder to load them from: a build with other flags, such as the sanitizers'.
"""

import os

if os.environ.get("ENGINE_KERNELS"):
    __path__ = [os.environ["ENGINE_KERNELS"]]
