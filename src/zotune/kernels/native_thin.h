/* Low-rank products of native.c, included once for each instruction set: y += (x kept^T) fresh, row by row.

   FOUR columns of the factors are taken at once, so that a number of x or y is loaded once for them. Sums over `in` run in
   LANES partial sums: compilers may use vectors without reordering anything. native_avx512.h has this in instructions. */

#ifndef OWN_ROWS

INLINE void LEVEL(widen)(float *RESTRICT to, const void *from, int64_t first, int64_t count, int bf16) {
    if (bf16)
        for (int64_t i = 0; i < count; i++) to[i] = value_of((uint32_t)((const uint16_t *)from)[first + i] << 16);
    else
        memcpy(to, (const float *)from + first, count * sizeof(float));
}

INLINE Lanes LEVEL(load)(const float *from) {
    Lanes made;
    memcpy(&made, from, sizeof made);
    return made;
}

INLINE void LEVEL(dots)(float *inner, const float *x, const float *kept, int64_t in, int together) {
    Lanes part[FOUR] = {{0}};
    int64_t i = 0;
    for (; i + LANES <= in; i += LANES) {
        const Lanes here = LEVEL(load)(x + i);
        for (int k = 0; k < together; k++) part[k] += here * LEVEL(load)(kept + k * in + i);
    }
    for (int k = 0; k < together; k++) {
        float sum = 0;
        for (int64_t j = i; j < in; j++) sum += x[j] * kept[k * in + j];
        for (int lane = 0; lane < LANES; lane++) sum += part[k][lane];
        inner[k] = sum;
    }
}

/* made += inner[0] * fresh[0] + ... of FOUR rows of `fresh`, or of one. */
INLINE void LEVEL(spread)(float *made, const float *inner, const float *fresh, int64_t out, int together) {
    int64_t j = 0;
    for (; j + LANES <= out; j += LANES) {
        Lanes here = LEVEL(load)(made + j);
        for (int k = 0; k < together; k++) here += inner[k] * LEVEL(load)(fresh + k * out + j);
        memcpy(made + j, &here, sizeof here);
    }
    for (; j < out; j++)
        for (int k = 0; k < together; k++) made[j] += inner[k] * fresh[k * out + j];
}

/* A row, with room for x, a row of the result and a few inner numbers. */
INLINE int64_t LEVEL(rows_at_once)(const Thin *thin, int64_t row, int64_t last, float *room, const float *fresh) {
    const int64_t in = thin->in, out = thin->out, rank = thin->rank;
    float *x = room, *made = x + in, inner[FOUR];
    (void)last;
    LEVEL(widen)(x, thin->x, row * in, in, (int)thin->bf16);
    LEVEL(widen)(made, thin->y, row * out, out, (int)thin->bf16);
    for (int64_t k = 0; k < rank;) {
        const int together = k + FOUR <= rank ? FOUR : 1;
        if (together == FOUR)
            LEVEL(dots)(inner, x, thin->kept + k * in, in, FOUR);
        else
            LEVEL(dots)(inner, x, thin->kept + k * in, in, 1);
        if (together == FOUR)
            LEVEL(spread)(made, inner, fresh + k * out, out, FOUR);
        else
            LEVEL(spread)(made, inner, fresh + k * out, out, 1);
        k += together;
    }
    if (thin->bf16) {
        uint16_t *RESTRICT y = (uint16_t *)thin->y + row * out;
        for (int64_t j = 0; j < out; j++) y[j] = nearest_bf16(made[j]);
    } else
        memcpy((float *)thin->y + row * out, made, out * sizeof(float));
    return 1;
}
#endif

/* One copy's fresh factor as (rank, out). */
static void LEVEL(fresh_of)(float *RESTRICT to, const Thin *thin, int64_t copy) {
    const float *from = thin->fresh + copy * thin->step;
    const int64_t rank = thin->rank, out = thin->out;
    if (!thin->turned) {
        memcpy(to, from, rank * out * sizeof(float));
        return;
    }
    for (int64_t k = 0; k < rank; k++)
        for (int64_t j = 0; j < out; j++) to[k * out + j] = from[j * rank + k];
}

/* Rows first ... last - 1, with room for the fresh factor and for some rows: see native_thin.py. */
static void LEVEL(thin)(const Thin *thin, int64_t first, int64_t last, float *room) {
    float *fresh = room, *more = fresh + thin->rank * thin->out;
    for (int64_t row = first; row < last;) {
        const int64_t copy = row / thin->each, end = (copy + 1) * thin->each;
        LEVEL(fresh_of)(fresh, thin, copy);
        while (row < end && row < last) row += LEVEL(rows_at_once)(thin, row, end < last ? end : last, more, fresh);
    }
}
