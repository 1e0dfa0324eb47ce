"""DeepGEMM's names, as JAX functions: for programs that come from there.

Arguments have DeepGEMM's names and order. What is another way here:

- d is None, and the value is returned; `out_dtype=` says its type, where DeepGEMM looks at d's. `c` is added
  where it is given, of either type.
- Sizes that DeepGEMM needs on the host, and alignments of groups, are not needed.
- What changes nothing on Hopper, or concerns how DeepGEMM compiles, is accepted: compiled_dims,
  disable_ue8m0_cast, ensure_zero_padding, schedule_meta, clean_logits.
- Further keyword arguments are those of this package's function of the same name, and settings of
  `jax_deepgemm.config` for one call: `fp8_gemm_nt(a, b, num_sms=100, block_size_multiple_of=64)`.
- What needs another GPU raises NotImplementedError, which says what to use.

`utils`, `testing` and `legacy` are modules, as there. docs/from_deepgemm.md has every name.
"""

from __future__ import annotations

from jax_deepgemm.deep_gemm import absent, attention, cublas, dense, grouped, knobs, products, utils
from jax_deepgemm.deep_gemm import legacy as legacy
from jax_deepgemm.deep_gemm import testing as testing
from jax_deepgemm.deep_gemm.absent import *  # noqa: F403
from jax_deepgemm.deep_gemm.attention import *  # noqa: F403
from jax_deepgemm.deep_gemm.cublas import *  # noqa: F403
from jax_deepgemm.deep_gemm.dense import *  # noqa: F403
from jax_deepgemm.deep_gemm.grouped import *  # noqa: F403
from jax_deepgemm.deep_gemm.knobs import *  # noqa: F403
from jax_deepgemm.deep_gemm.products import *  # noqa: F403
from jax_deepgemm.deep_gemm.utils import *  # noqa: F403

AREAS = (knobs, dense, cublas, grouped, products, attention, utils, absent)
__all__ = sorted({name for area in AREAS for name in area.__all__} | {"legacy", "testing", "utils"})
