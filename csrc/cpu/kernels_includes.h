#pragma once

// What kernels.inl and its parts need, included before the target of an instruction set is set:
// functions of the standard library must stay at the baseline, since the linker keeps only one copy of
// each.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/adam.h"
#include "common/noise.h"
#include "common/params.h"
#include "cpu/kernel_table.h"
