/* Low-rank products of native.c, included once for each instruction set: out += (x kept^T) fresh, row by row.

   Sums over `in` run in LANES partial sums, so that compilers may use vectors without reordering anything. */

INLINE void LEVEL(row_of_x)(float *RESTRICT to, const Thin *thin, int64_t row) {
    if (thin->bf16) {
        const uint16_t *x = (const uint16_t *)thin->x + row * thin->in;
        for (int64_t i = 0; i < thin->in; i++) to[i] = value_of((uint32_t)x[i] << 16);
    } else
        memcpy(to, (const float *)thin->x + row * thin->in, thin->in * sizeof(float));
}

INLINE float LEVEL(dot)(const float *RESTRICT a, const float *RESTRICT b, int64_t count) {
    float part[LANES] = {0}, sum = 0;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int lane = 0; lane < LANES; lane++) part[lane] += a[i + lane] * b[i + lane];
    for (; i < count; i++) sum += a[i] * b[i];
    for (int lane = 0; lane < LANES; lane++) sum += part[lane];
    return sum;
}

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

/* Rows first ... last - 1, with room for x, the fresh factor and a row of the result: in + (rank + 1) * out numbers. */
static void LEVEL(thin)(const Thin *thin, int64_t first, int64_t last, float *room) {
    float *x = room, *fresh = x + thin->in, *made = fresh + thin->rank * thin->out;
    const int64_t out = thin->out;
    int64_t at = -1; /* the copy whose factor is in `fresh` */
    for (int64_t row = first; row < last; row++) {
        if (row / thin->each != at) LEVEL(fresh_of)(fresh, thin, at = row / thin->each);
        LEVEL(row_of_x)(x, thin, row);
        for (int64_t k = 0; k < thin->rank; k++) {
            const float inner = LEVEL(dot)(x, thin->kept + k * thin->in, thin->in), *RESTRICT from = fresh + k * out;
            float *RESTRICT to = made;
            if (k == 0)
                for (int64_t j = 0; j < out; j++) to[j] = inner * from[j];
            else
                for (int64_t j = 0; j < out; j++) to[j] += inner * from[j];
        }
        if (thin->bf16) {
            uint16_t *RESTRICT y = (uint16_t *)thin->y + row * out;
            for (int64_t j = 0; j < out; j++) y[j] = nearest_bf16(value_of((uint32_t)y[j] << 16) + made[j]);
        } else {
            float *RESTRICT y = (float *)thin->y + row * out;
            for (int64_t j = 0; j < out; j++) y[j] += made[j];
        }
    }
}
