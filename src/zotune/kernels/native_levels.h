/* The loops of native.c compiled for several instruction sets: tables of functions, and `best`, the best that there is. */

typedef void Work(const Job *, int64_t, int64_t);
typedef void WorkValues(const Values *, int64_t, int64_t);
typedef void WorkMoments(const Moments *, int64_t);
typedef void WorkThin(const Thin *, int64_t, int64_t, float *);
#define LEVEL(name) name##_plain
#include "native_loops.h"
#include "native_thin.h"
#include "native_values.h"
#undef LEVEL

#if defined(__x86_64__) && defined(__GNUC__)
#define PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define BEGIN_TARGET(set) PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define END_TARGET PRAGMA(clang attribute pop)
#else
#define BEGIN_TARGET(set) PRAGMA(GCC push_options) PRAGMA(GCC target(set))
#define END_TARGET PRAGMA(GCC pop_options)
#endif

BEGIN_TARGET("avx2")
#define LEVEL(name) name##_avx2
#include "native_loops.h"
#include "native_thin.h"
#include "native_values.h"
#undef LEVEL
END_TARGET

#include <immintrin.h>

/* Which of 64 halves, 32 of the first and 32 of the second operand, a permutation takes. */
#define EACH32(OF)                                                                                                     \
    {OF(0),  OF(1),  OF(2),  OF(3),  OF(4),  OF(5),  OF(6),  OF(7),  OF(8),  OF(9),  OF(10), OF(11), OF(12), OF(13), OF(14), OF(15), \
     OF(16), OF(17), OF(18), OF(19), OF(20), OF(21), OF(22), OF(23), OF(24), OF(25), OF(26), OF(27), OF(28), OF(29), OF(30), OF(31)}
#define JOINED(i) ((i) / 2 + (i) % 2 * 32)
#define JOINED_AFTER(i) (JOINED(i) + 16)
#define EVEN(i) (2 * (i))
#define ODD(i) (2 * (i) + 1)
typedef uint16_t Halves[32] __attribute__((aligned(64)));
static const Halves FIRST = EACH32(JOINED), SECOND = EACH32(JOINED_AFTER), LOWER = EACH32(EVEN), UPPER = EACH32(ODD);

#define OWN_ROWS
BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl")
#define LEVEL(name) name##_avx512
#include "native_avx512.h"
#include "native_loops.h"
#include "native_thin.h"
#include "native_values.h"
#undef LEVEL
END_TARGET
BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#define LEVEL(name) name##_avx512_bf16
#define BF16_INSTRUCTIONS
#include "native_avx512.h"
#include "native_loops.h"
#include "native_thin.h"
#include "native_values.h"
#undef LEVEL
END_TARGET

#define EACH_LEVEL(name) {name##_plain, name##_avx2, name##_avx512, name##_avx512_bf16}

static int best(void) {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2")) return 0;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
        return 1;
    return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
}
#else
#define EACH_LEVEL(name) {name##_plain}

static int best(void) { return 0; }
#endif

static Work *const WORK[] = EACH_LEVEL(work);
static WorkThin *const THIN[] = EACH_LEVEL(thin);
static WorkValues *const READ[] = EACH_LEVEL(read), *const WRITE[] = EACH_LEVEL(write);
static WorkMoments *const MOMENTS[] = EACH_LEVEL(moments);
