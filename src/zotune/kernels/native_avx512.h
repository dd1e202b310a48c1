/* Whole rows of native_loops.h in AVX-512 instructions, the same bits in half the time: signs are masks, and 32 numbers of
   16 bits are joined with, or parted from, their lower halves in two permutations. */

typedef struct {
    __m512 part[4];
} LEVEL(Row);

/* Numbers with the sign changed where `flips` has a bit. */
INLINE __m512 LEVEL(flipped)(__m512 x, uint64_t flips, int part) {
    const __m512i bits = _mm512_castps_si512(x), sign = _mm512_set1_epi32((int)0x80000000);
    return _mm512_castsi512_ps(_mm512_mask_xor_epi32(bits, (__mmask16)(flips >> 16 * part), bits, sign));
}

/* A bit for each element of a row that a mask keeps: its 16 random bits are below the limit. */
INLINE uint64_t LEVEL(kept)(const uint32_t *words, uint32_t limit) {
    const __m512i most = _mm512_set1_epi16((short)limit);
    const uint64_t high = _mm512_cmplt_epu16_mask(_mm512_loadu_si512(words + 16), most);
    return high << 32 | _mm512_cmplt_epu16_mask(_mm512_loadu_si512(words), most);
}

/* 16 of the numbers of a tensor, from `from` on. */
INLINE __m512 LEVEL(given)(const Term *term, int64_t from) {
    if (term->book == GIVEN_FP32) return _mm512_loadu_ps((const float *)term->numbers + from);
    if (term->book == GIVEN_BF16) {
        const __m256i halves = _mm256_loadu_si256((const __m256i *)((const uint16_t *)term->numbers + from));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }
    const double *wide = (const double *)term->numbers + from;
    const __m256 low = _mm512_cvtpd_ps(_mm512_loadu_pd(wide)), high = _mm512_cvtpd_ps(_mm512_loadu_pd(wide + 8));
    return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
}

INLINE void LEVEL(factors_float)(float *RESTRICT to, const Term *term, int64_t from, int inside, int count);

/* scale times 64 elements of left @ right, from number `from` on: fused or not, no product and no sum is rounded. */
INLINE void LEVEL(factors)(__m512 *made, const Term *term, int64_t from) {
    const int64_t column = from % term->width;
    const float *left = (const float *)term->numbers + from / term->width * term->down, *right = term->right + column;
    const __m512 scale = _mm512_set1_ps((float)term->scale);
    if (column + ROW > term->width) { /* the end of a row of the matrix */
        float some[ROW];
        LEVEL(factors_float)(some, term, from, 0, ROW);
        for (int i = 0; i < 4; i++) made[i] = _mm512_loadu_ps(some + 16 * i);
        return;
    }
    if (term->book == LOW_RANK_FP32) {
        for (int i = 0; i < 4; i++) made[i] = _mm512_setzero_ps();
        for (int64_t k = 0; k < term->rank; k++, right += term->width) {
            const __m512 factor = _mm512_set1_ps(left[k * term->along]);
            for (int i = 0; i < 4; i++) made[i] = _mm512_fmadd_ps(factor, _mm512_loadu_ps(right + 16 * i), made[i]);
        }
    } else {
        __m512d wide[8];
        for (int i = 0; i < 8; i++) wide[i] = _mm512_setzero_pd();
        for (int64_t k = 0; k < term->rank; k++, right += term->width) {
            const __m512d factor = _mm512_set1_pd(left[k * term->along]);
            for (int i = 0; i < 8; i++)
                wide[i] = _mm512_fmadd_pd(factor, _mm512_cvtps_pd(_mm256_loadu_ps(right + 8 * i)), wide[i]);
        }
        for (int i = 0; i < 4; i++) {
            const __m512 low = _mm512_castps256_ps512(_mm512_cvtpd_ps(wide[2 * i]));
            made[i] = _mm512_insertf32x8(low, _mm512_cvtpd_ps(wide[2 * i + 1]), 1);
        }
    }
    for (int i = 0; i < 4; i++) made[i] = _mm512_mul_ps(made[i], scale);
}

/* scale times what a term is made of, on one row; a mask is not in it. `numbers`: it is made of drawn numbers. */
INLINE void LEVEL(product)(
    __m512 *made, const Job *job, const Term *term, const Drawn *drawn, int row, int64_t tile, int numbers
) {
    const __m512 scale = _mm512_set1_ps((float)term->scale);
    uint64_t flips;
    if (numbers) {
        const uint32_t name = drawn->words[row >> 1] >> (16 * (row & 1)) & 0xFFF;
        const float *z = (const float *)job->scaled + ((term - job->term) * BASE + (name & (BASE - 1))) * ROW;
        memcpy(&flips, walsh[name >> 5 & (ROW - 1)], 8);
        flips ^= 0 - (uint64_t)(name >> 11);
        for (int i = 0; i < 4; i++) made[i] = LEVEL(flipped)(_mm512_load_ps(z + 16 * i), flips, i);
    } else if (term->book == SIGNS) {
        memcpy(&flips, drawn->words + 2 * row, 8);
        for (int i = 0; i < 4; i++) made[i] = LEVEL(flipped)(scale, flips, i);
    } else if (term->book < LOW_RANK)
        for (int i = 0; i < 4; i++) made[i] = _mm512_mul_ps(scale, LEVEL(given)(term, tile + row * ROW + 16 * i));
    else
        LEVEL(factors)(made, term, tile + row * ROW);
}

/* The terms of one row, as sum_float of native_loops.h. */
static NOT_INLINE void LEVEL(sum_of_any)(LEVEL(Row) *sum, const Job *job, const Drawn *drawn, int row, int64_t tile) {
    __m512 whole[4] = {0};
    for (int t = 0; t < job->terms; t++, drawn++) {
        const Term *term = job->term + t;
        __m512 made[4];
        LEVEL(product)(made, job, term, drawn, row, tile, term->book == NUMBERS);
        if (term->limit)
            for (int i = 0; i < 4; i++)
                made[i] = _mm512_mask_mov_ps(_mm512_set1_ps(-0.0f), (__mmask16)(drawn->kept[row] >> 16 * i), made[i]);
        for (int i = 0; i < 4; i++) whole[i] = t ? _mm512_add_ps(whole[i], made[i]) : made[i];
    }
    for (int i = 0; i < 4; i++) sum->part[i] = whole[i];
}

INLINE LEVEL(Row) LEVEL(summed)(const Job *job, const Drawn *drawn, int row, int64_t tile, int one) {
    LEVEL(Row) sum;
    if (one)
        LEVEL(product)(sum.part, job, job->term, drawn, row, tile, 1);
    else
        LEVEL(sum_of_any)(&sum, job, drawn, row, tile);
    return sum;
}

/* 32 numbers as bf16, as nearest_bf16 of native.c. */
INLINE __m512i LEVEL(nearest)(__m512 low, __m512 high) {
#ifdef BF16_INSTRUCTIONS /* they round alike, but for numbers that are subnormal or none: QNaN, subnormal, SNaN */
    const __mmask16 odd = _mm512_fpclass_ps_mask(low, 0xA1) | _mm512_fpclass_ps_mask(high, 0xA1);
    if (__builtin_expect(!odd, 1)) return (__m512i)_mm512_cvtne2ps_pbh(high, low);
#endif
    __m512i half[2] = {_mm512_castps_si512(low), _mm512_castps_si512(high)};
    for (int i = 0; i < 2; i++) {
        const __mmask16 none = _mm512_cmp_ps_mask(i ? high : low, i ? high : low, _CMP_UNORD_Q);
        const __m512i even = _mm512_and_si512(_mm512_srli_epi32(half[i], 16), _mm512_set1_epi32(1));
        half[i] = _mm512_add_epi32(half[i], _mm512_add_epi32(even, _mm512_set1_epi32(0x7FFF)));
        half[i] = _mm512_mask_mov_epi32(half[i], none, _mm512_set1_epi32(0x7FC00000));
    }
    return _mm512_permutex2var_epi16(half[0], _mm512_load_si512(UPPER), half[1]);
}

/* 32 numbers of which `stored` has the upper halves, and `carried` the lower ones as signed numbers. */
INLINE void LEVEL(join)(__m512 *value, __m512i stored, __m512i carried) {
    stored = _mm512_add_epi16(stored, _mm512_srai_epi16(carried, 15));
    value[0] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(carried, _mm512_load_si512(FIRST), stored));
    value[1] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(carried, _mm512_load_si512(SECOND), stored));
}

INLINE void LEVEL(row_of_fp32)(const Job *job, const LEVEL(Row) *sum, int64_t at) {
    __m512 value[4];
    for (int i = 0; i < 4; i++) value[i] = _mm512_loadu_ps((const float *)job->stored + at + 16 * i);
    for (int k = 0; k < job->outs; k++) {
        float *out = (float *)job->out[k].tensor + at;
        if (job->out[k].minus)
            for (int i = 0; i < 4; i++) _mm512_storeu_ps(out + 16 * i, _mm512_sub_ps(value[i], sum->part[i]));
        else
            for (int i = 0; i < 4; i++) _mm512_storeu_ps(out + 16 * i, _mm512_add_ps(value[i], sum->part[i]));
    }
}

INLINE void LEVEL(row_of_bf16)(const Job *job, const LEVEL(Row) *sum, int64_t at, int kind) {
    __m512 value[4];
    for (int i = 0; i < 2; i++) {
        const __m512i stored = _mm512_loadu_si512((const uint16_t *)job->stored + at + 32 * i);
        const __m512i carried =
            kind == BF16 ? _mm512_setzero_si512() : _mm512_loadu_si512(job->carried + at + 32 * i);
        LEVEL(join)(value + 2 * i, stored, carried);
    }
    for (int k = 0; k < job->outs; k++) {
        uint16_t *out = (uint16_t *)job->out[k].tensor + at;
        for (int i = 0; i < 2; i++, out += 32) {
            const __m512 *x = value + 2 * i, *z = sum->part + 2 * i;
            if (kind == BF16_SPLIT) {
                const __m512i low = _mm512_castps_si512(_mm512_add_ps(x[0], z[0]));
                const __m512i high = _mm512_castps_si512(_mm512_add_ps(x[1], z[1]));
                const __m512i carried = _mm512_permutex2var_epi16(low, _mm512_load_si512(LOWER), high);
                const __m512i upper = _mm512_permutex2var_epi16(low, _mm512_load_si512(UPPER), high);
                _mm512_storeu_si512(job->carried + at + 32 * i, carried);
                _mm512_storeu_si512(out, _mm512_sub_epi16(upper, _mm512_srai_epi16(carried, 15)));
            } else if (job->out[k].minus)
                _mm512_storeu_si512(out, LEVEL(nearest)(_mm512_sub_ps(x[0], z[0]), _mm512_sub_ps(x[1], z[1])));
            else
                _mm512_storeu_si512(out, LEVEL(nearest)(_mm512_add_ps(x[0], z[0]), _mm512_add_ps(x[1], z[1])));
        }
    }
}

/* Whole rows of one kind; `one`: of one term of numbers. */
INLINE void LEVEL(rows)(
    const Job *job, const Drawn *drawn, int row, int last, int64_t tile, int64_t at, int kind, int one
) {
    const Job *before = job->before;
    const int single = one && before && only_numbers(before);
    for (; row < last; row++, at += ROW) {
        if (before) {
            const LEVEL(Row) sum = LEVEL(summed)(before, drawn + job->terms, row, tile, single);
            if (kind == FP32)
                LEVEL(row_of_fp32)(before, &sum, at);
            else
                LEVEL(row_of_bf16)(before, &sum, at, BF16_SPLIT);
        }
        const LEVEL(Row) sum = LEVEL(summed)(job, drawn, row, tile, one);
        if (kind == FP32)
            LEVEL(row_of_fp32)(job, &sum, at);
        else
            LEVEL(row_of_bf16)(job, &sum, at, kind);
    }
}

/* ------------------------------------------------------------------------------------------------------------------
   Low-rank products of native_thin.h: some rows at once, so that a number of a factor is loaded once for them. */

/* Up to 16 numbers of a row of x or y, of those that `some` names. */
INLINE __m512 LEVEL(some_of)(const void *from, int64_t at, __mmask16 some, int bf16) {
    if (!bf16) return _mm512_maskz_loadu_ps(some, (const float *)from + at);
    const __m256i halves = _mm256_maskz_loadu_epi16(some, (const uint16_t *)from + at);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

INLINE void LEVEL(put_some)(void *to, int64_t at, __mmask16 some, __m512 value, int bf16) {
    if (!bf16) {
        _mm512_mask_storeu_ps((float *)to + at, some, value);
        return;
    }
    const __m512i both = LEVEL(nearest)(value, _mm512_setzero_ps());
    _mm256_mask_storeu_epi16((uint16_t *)to + at, some, _mm512_castsi512_si256(both));
}

INLINE __mmask16 LEVEL(up_to)(int64_t left) { return (__mmask16)(left >= 16 ? 0xFFFF : (1u << left) - 1); }

/* inner[r * rank + k] = x of row r with each of `columns` rows of `kept`. */
INLINE void LEVEL(dots_of)(float *inner, const Thin *thin, int64_t row, int64_t k, int rows, int columns, int bf16) {
    __m512 sum[FOUR][FOUR];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) sum[r][c] = _mm512_setzero_ps();
    for (int64_t i = 0; i < thin->in; i += 16) {
        const __mmask16 some = LEVEL(up_to)(thin->in - i);
        __m512 factor[FOUR];
        for (int c = 0; c < columns; c++) factor[c] = _mm512_maskz_loadu_ps(some, thin->kept + (k + c) * thin->in + i);
        for (int r = 0; r < rows; r++) {
            const __m512 x = LEVEL(some_of)(thin->x, (row + r) * thin->in + i, some, bf16);
            for (int c = 0; c < columns; c++) sum[r][c] = _mm512_fmadd_ps(x, factor[c], sum[r][c]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) inner[r * thin->rank + k + c] = _mm512_reduce_add_ps(sum[r][c]);
}

/* y of each row += its inner numbers times the rows of `fresh`. */
INLINE void LEVEL(spread_of)(
    const Thin *thin, int64_t row, const float *inner, const float *fresh, int rows, int64_t rank, int bf16
) {
    for (int64_t j = 0; j < thin->out; j += 16) {
        const __mmask16 some = LEVEL(up_to)(thin->out - j);
        __m512 y[FOUR];
        for (int r = 0; r < rows; r++) y[r] = LEVEL(some_of)(thin->y, (row + r) * thin->out + j, some, bf16);
        for (int64_t k = 0; k < rank; k++) {
            const __m512 factor = _mm512_maskz_loadu_ps(some, fresh + k * thin->out + j);
            for (int r = 0; r < rows; r++) y[r] = _mm512_fmadd_ps(_mm512_set1_ps(inner[r * rank + k]), factor, y[r]);
        }
        for (int r = 0; r < rows; r++) LEVEL(put_some)(thin->y, (row + r) * thin->out + j, some, y[r], bf16);
    }
}

INLINE void LEVEL(some_rows)(const Thin *thin, int64_t row, float *inner, const float *fresh, int rows, int bf16) {
    int64_t k = 0;
    for (; k + FOUR <= thin->rank; k += FOUR) LEVEL(dots_of)(inner, thin, row, k, rows, FOUR, bf16);
    for (; k < thin->rank; k++) LEVEL(dots_of)(inner, thin, row, k, rows, 1, bf16);
    if (thin->rank == FOUR)
        LEVEL(spread_of)(thin, row, inner, fresh, rows, FOUR, bf16);
    else
        LEVEL(spread_of)(thin, row, inner, fresh, rows, thin->rank, bf16);
}

/* As many rows from `row` on as are taken at once, of those before `last`. */
INLINE int64_t LEVEL(rows_at_once)(const Thin *thin, int64_t row, int64_t last, float *inner, const float *fresh) {
    const int many = last - row >= FOUR;
    if (thin->bf16)
        many ? LEVEL(some_rows)(thin, row, inner, fresh, FOUR, 1) : LEVEL(some_rows)(thin, row, inner, fresh, 1, 1);
    else
        many ? LEVEL(some_rows)(thin, row, inner, fresh, FOUR, 0) : LEVEL(some_rows)(thin, row, inner, fresh, 1, 0);
    return many ? FOUR : 1;
}
