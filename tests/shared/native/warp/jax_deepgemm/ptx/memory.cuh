#pragma once
#include <jax_deepgemm/ptx/warp.cuh>
