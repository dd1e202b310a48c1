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

/* The terms of one row, as sum_float of native_loops.h. */
INLINE LEVEL(Row) LEVEL(summed)(const Job *job, const uint32_t (*words)[WORDS], int row, int one) {
    LEVEL(Row) sum = {{_mm512_setzero_ps()}};
    for (int t = 0; t < (one ? 1 : job->terms); t++) {
        const int numbers = one || job->term[t].book == NUMBERS;
        const uint32_t name = words[t][row >> 1] >> (16 * (row & 1)) & 0xFFF;
        const float *z = (const float *)job->scaled + (t * BASE + (name & (BASE - 1))) * ROW;
        uint64_t flips;
        memcpy(&flips, numbers ? walsh[name >> 5 & (ROW - 1)] : &words[t][2 * row], 8);
        if (numbers) flips ^= 0 - (uint64_t)(name >> 11);
        for (int part = 0; part < 4; part++) {
            const __m512 plain = numbers ? _mm512_load_ps(z + 16 * part) : _mm512_set1_ps((float)job->term[t].scale);
            const __m512 term = LEVEL(flipped)(plain, flips, part);
            sum.part[part] = t ? _mm512_add_ps(sum.part[part], term) : term;
        }
    }
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
INLINE void LEVEL(rows)(const Job *job, const uint32_t (*words)[WORDS], int row, int last, int64_t at, int kind, int one) {
    const Job *before = job->before;
    const int single = one && before && before->terms == 1 && before->term->book == NUMBERS;
    for (; row < last; row++, at += ROW) {
        if (before) {
            const LEVEL(Row) sum = LEVEL(summed)(before, words + job->terms, row, single);
            if (kind == FP32)
                LEVEL(row_of_fp32)(before, &sum, at);
            else
                LEVEL(row_of_bf16)(before, &sum, at, BF16_SPLIT);
        }
        const LEVEL(Row) sum = LEVEL(summed)(job, words, row, one);
        if (kind == FP32)
            LEVEL(row_of_fp32)(job, &sum, at);
        else
            LEVEL(row_of_bf16)(job, &sum, at, kind);
    }
}
