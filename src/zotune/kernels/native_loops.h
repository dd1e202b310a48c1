/* The loops of native.c, included once for each instruction set; LEVEL(name) gives every function a name of its own.

   A thread works through tiles of elements: it draws the random words of a tile for all terms, and then, row by row, sums
   the terms and adds the sum to the values while they stream past. */

/* Philox4x32-10 (Salmon et al. 2011) of `n` blocks from `first`: words[4 * block + word], as kernels/philox.py. */
INLINE void LEVEL(philox)(uint32_t *RESTRICT words, const uint32_t *key, uint64_t site, uint64_t first, int n) {
    uint32_t c0[MASK_COUNTERS], c1[MASK_COUNTERS], c2[MASK_COUNTERS], c3[MASK_COUNTERS];
    for (int i = 0; i < n; i++) {
        c0[i] = (uint32_t)(first + i);
        c1[i] = (uint32_t)((first + i) >> 32);
        c2[i] = (uint32_t)site;
        c3[i] = (uint32_t)(site >> 32);
    }
    uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
        for (int i = 0; i < n; i++) {
            uint64_t p0 = (uint64_t)c0[i] * 0xD2511F53u, p1 = (uint64_t)c2[i] * 0xCD9E8D57u;
            c0[i] = (uint32_t)(p1 >> 32) ^ c1[i] ^ k0;
            c1[i] = (uint32_t)p1;
            c2[i] = (uint32_t)(p0 >> 32) ^ c3[i] ^ k1;
            c3[i] = (uint32_t)p0;
        }
    for (int i = 0; i < n; i++) {
        words[4 * i] = c0[i];
        words[4 * i + 1] = c1[i];
        words[4 * i + 2] = c2[i];
        words[4 * i + 3] = c3[i];
    }
}

#ifndef OWN_ROWS
/* A bit for each element of a row that a mask keeps: its 16 random bits are below the limit. */
INLINE uint64_t LEVEL(kept)(const uint32_t *words, uint32_t limit) {
    uint64_t kept = 0;
    for (int i = 0; i < ROW / 2; i++)
        kept |= (uint64_t)((words[i] & 0xFFFF) < limit) << 2 * i | (uint64_t)(words[i] >> 16 < limit) << (2 * i + 1);
    return kept;
}
#endif

/* A word has the bits of two elements, the lower half those of the first (core/noise.py, `lanes`). */
static void LEVEL(draw_mask)(uint64_t *kept, const Term *term, uint64_t site, int64_t tile, int64_t low, int64_t high) {
    uint32_t words[4 * MASK_COUNTERS];
    const int64_t step = 8 * MASK_COUNTERS; /* elements: a block has bits for eight */
    for (int64_t at = low / step * step; at < high; at += step) {
        LEVEL(philox)(words, term->mask, site, (uint64_t)(at / 8), MASK_COUNTERS);
        for (int row = 0; row < step / ROW; row++)
            kept[(at - tile) / ROW + row] = LEVEL(kept)(words + row * ROW / 2, (uint32_t)term->limit);
    }
}

/* What is drawn of all terms for elements low ... high - 1 of the tile that begins with element `tile`. */
static void LEVEL(draw)(Drawn *drawn, const Job *job, int64_t tile, int64_t low, int64_t high) {
    for (int t = 0; t < job->terms; t++, drawn++) {
        const Term *term = job->term + t;
        const int64_t block = term->book == NUMBERS ? BLOCK : BLOCK / 4, step = COUNTERS * block;
        if (term->limit) LEVEL(draw_mask)(drawn->kept, term, job->site, tile, low, high);
        if (term->book > SIGNS) continue;
        for (int64_t at = low / step * step; at < high; at += step) /* COUNTERS blocks of numbers are a tile */
            LEVEL(philox)(drawn->words + (at - tile) / block * 4, term->key, job->site, (uint64_t)(at / block), COUNTERS);
    }
}

/* product_REAL: scale * z of one row of ROW elements, `row` counted in its tile; what is not drawn only for the elements
   `inside` to `inside + count - 1`, and 0 elsewhere. -0.0 where a mask leaves an element out.
   sum_REAL: the terms of the row: each product rounded, then each sum. The first product begins it: -0.0 + x is x, bit for
   bit. `one`: there is one term, of numbers and without a mask.
   add_REAL: out = stored + sum, or minus it; `stored` may be the output itself. */
#define OF(REAL)                                                                                                       \
    INLINE void LEVEL(given_##REAL)(REAL *RESTRICT to, const Term *term, int64_t from, int inside, int count) {        \
        const REAL scale = (REAL)term->scale;                                                                          \
        for (int i = 0; i < ROW; i++) to[i] = 0;                                                                       \
        for (int i = inside; i < inside + count; i++)                                                                  \
            to[i] = scale * (term->book == GIVEN_BF16                                                                  \
                                 ? (REAL)value_of((uint32_t)((const uint16_t *)term->numbers)[from + i] << 16)         \
                             : term->book == GIVEN_FP32 ? (REAL)((const float *)term->numbers)[from + i]               \
                                                        : (REAL)((const double *)term->numbers)[from + i]);            \
    }                                                                                                                  \
    INLINE void LEVEL(factors_##REAL)(REAL *RESTRICT to, const Term *term, int64_t from, int inside, int count) {      \
        const REAL scale = (REAL)term->scale;                                                                          \
        for (int i = 0; i < ROW; i++) to[i] = 0;                                                                       \
        for (int i = inside, end = inside + count; i < end;) {                                                         \
            const int64_t row = (from + i) / term->width, column = (from + i) % term->width;                           \
            const int next = term->width - column < end - i ? i + (int)(term->width - column) : end;                   \
            const float *left = (const float *)term->numbers + row * term->down;                                       \
            double sum[ROW] = {0};                                                                                     \
            for (int64_t k = 0; k < term->rank; k++) {                                                                 \
                const double factor = left[k * term->along];                                                           \
                const float *right = term->right + k * term->width + column;                                           \
                for (int j = 0; j < next - i; j++) sum[j] += factor * right[j];                                        \
            }                                                                                                          \
            for (int j = 0; i < next; i++, j++) to[i] = (REAL)sum[j] * scale;                                          \
        }                                                                                                              \
    }                                                                                                                  \
    INLINE void LEVEL(product_##REAL)(REAL *RESTRICT to, const Job *job, const Drawn *drawn, int t, int row,           \
                                      int64_t tile, int inside, int count, int one) {                                  \
        const Term *term = job->term + t;                                                                              \
        if (one || term->book == NUMBERS) {                                                                            \
            const uint32_t name = drawn->words[row >> 1] >> (16 * (row & 1)) & 0xFFF, sign = 0 - (name >> 11);         \
            const REAL *z = (const REAL *)job->scaled + (t * BASE + (name & (BASE - 1))) * ROW;                        \
            for (int half = 0; half < 2; half++) {                                                                     \
                const uint32_t word = walsh[name >> 5 & (ROW - 1)][half] ^ sign;                                       \
                const REAL *RESTRICT from = z + 32 * half;                                                             \
                REAL *RESTRICT into = to + 32 * half;                                                                  \
                for (int i = 0; i < 32; i++) into[i] = word & BIT[i] ? -from[i] : from[i];                             \
            }                                                                                                          \
        } else if (term->book == SIGNS) {                                                                              \
            const REAL scale = (REAL)term->scale;                                                                      \
            for (int half = 0; half < 2; half++) {                                                                     \
                const uint32_t word = drawn->words[2 * row + half];                                                    \
                REAL *RESTRICT into = to + 32 * half;                                                                  \
                for (int i = 0; i < 32; i++) into[i] = word & BIT[i] ? -scale : scale;                                 \
            }                                                                                                          \
        } else if (term->book < LOW_RANK)                                                                              \
            LEVEL(given_##REAL)(to, term, tile + row * ROW, inside, count);                                            \
        else                                                                                                           \
            LEVEL(factors_##REAL)(to, term, tile + row * ROW, inside, count);                                          \
        if (!one && term->limit)                                                                                       \
            for (int i = 0; i < ROW; i++) to[i] = drawn->kept[row] >> i & 1 ? to[i] : -(REAL)0;                        \
    }                                                                                                                  \
    static NOT_INLINE void LEVEL(sum_of_any_##REAL)(REAL *RESTRICT sum, const Job *job, const Drawn *drawn, int row,   \
                                                    int64_t tile, int inside, int count) {                             \
        LEVEL(product_##REAL)(sum, job, drawn, 0, row, tile, inside, count, 0);                                        \
        for (int t = 1; t < job->terms; t++) {                                                                         \
            REAL next[ROW];                                                                                            \
            LEVEL(product_##REAL)(next, job, drawn + t, t, row, tile, inside, count, 0);                               \
            for (int i = 0; i < ROW; i++) sum[i] += next[i];                                                           \
        }                                                                                                              \
    }                                                                                                                  \
    INLINE void LEVEL(sum_##REAL)(REAL *RESTRICT sum, const Job *job, const Drawn *drawn, int row, int64_t tile,       \
                                  int inside, int count, int one) {                                                    \
        if (one)                                                                                                       \
            LEVEL(product_##REAL)(sum, job, drawn, 0, row, tile, inside, count, 1);                                    \
        else                                                                                                           \
            LEVEL(sum_of_any_##REAL)(sum, job, drawn, row, tile, inside, count);                                       \
    }                                                                                                                  \
    INLINE void LEVEL(add_##REAL)(const Job *job, const REAL *sum, int64_t at, int count) {                            \
        const REAL *stored = (const REAL *)job->stored + at;                                                           \
        for (int k = 0; k < job->outs; k++) {                                                                          \
            REAL *out = (REAL *)job->out[k].tensor + at;                                                               \
            if (job->out[k].minus)                                                                                     \
                for (int i = 0; i < count; i++) out[i] = stored[i] - sum[i];                                           \
            else                                                                                                       \
                for (int i = 0; i < count; i++) out[i] = stored[i] + sum[i];                                           \
        }                                                                                                              \
    }
OF(float)
OF(double)

/* bf16 outputs of bf16 values, whose bits as fp32 numbers are stored * 2**16 + carried (core/weights.py). */
INLINE void LEVEL(add_bf16)(const Job *job, const float *RESTRICT sum, int64_t at, int count, int kind) {
    float value[ROW];
    const uint16_t *stored = (const uint16_t *)job->stored + at;
    if (kind == BF16)
        for (int i = 0; i < count; i++) value[i] = value_of((uint32_t)stored[i] << 16);
    else {
        const int16_t *carried = job->carried + at;
        for (int i = 0; i < count; i++)
            value[i] = value_of(((uint32_t)stored[i] << 16) + (uint32_t)(int32_t)carried[i]);
    }
    for (int k = 0; k < job->outs; k++) {
        uint16_t *RESTRICT out = (uint16_t *)job->out[k].tensor + at;
        if (kind == BF16_SPLIT) {
            int16_t *RESTRICT carried = job->carried + at;
            for (int i = 0; i < count; i++) { /* halves away from zero: then the low half is the rest, as a signed number */
                const uint32_t bits = bits_of(value[i] + sum[i]);
                out[i] = (uint16_t)((bits + 0x8000) >> 16);
                carried[i] = (int16_t)bits;
            }
        } else if (job->out[k].minus)
            for (int i = 0; i < count; i++) out[i] = nearest_bf16(value[i] - sum[i]);
        else
            for (int i = 0; i < count; i++) out[i] = nearest_bf16(value[i] + sum[i]);
    }
}

/* `count` elements of any kind, beginning with number `inside` of a row: where a run begins and ends, and fp64. */
static void LEVEL(edge)(const Job *job, const Drawn *drawn, int row, int64_t tile, int inside, int64_t at, int count) {
    double wide[ROW];
    float single[ROW];
    if (job->kind == FP64) {
        LEVEL(sum_double)(wide, job, drawn, row, tile, inside, count, 0);
        LEVEL(add_double)(job, wide + inside, at, count);
        return;
    }
    LEVEL(sum_float)(single, job, drawn, row, tile, inside, count, 0);
    if (job->kind == FP32)
        LEVEL(add_float)(job, single + inside, at, count);
    else
        LEVEL(add_bf16)(job, single + inside, at, count, job->kind);
}

#ifndef OWN_ROWS
/* Whole rows of one kind; `one`: of one term of numbers, whose scale stays in a register. */
INLINE void LEVEL(rows)(
    const Job *job, const Drawn *drawn, int row, int last, int64_t tile, int64_t at, int kind, int one
) {
    for (; row < last; row++, at += ROW) {
        float sum[ROW];
        if (job->before) LEVEL(edge)(job->before, drawn + job->terms, row, tile, 0, at, ROW);
        LEVEL(sum_float)(sum, job, drawn, row, tile, 0, ROW, one);
        if (kind == FP32)
            LEVEL(add_float)(job, sum, at, ROW);
        else
            LEVEL(add_bf16)(job, sum, at, ROW, kind);
    }
}
#endif
#define ROWS(KIND)                                                                                                     \
    static void LEVEL(rows_##KIND)(const Job *job, const Drawn *drawn, int row, int last, int64_t tile, int64_t at) {  \
        if (only_numbers(job))                                                                                         \
            LEVEL(rows)(job, drawn, row, last, tile, at, KIND, 1);                                                     \
        else                                                                                                           \
            LEVEL(rows)(job, drawn, row, last, tile, at, KIND, 0);                                                     \
    }
ROWS(FP32)
ROWS(BF16)
ROWS(BF16_CARRIED)
ROWS(BF16_SPLIT)

static void LEVEL(rows_FP64)(const Job *job, const Drawn *drawn, int row, int last, int64_t tile, int64_t at) {
    for (; row < last; row++, at += ROW) {
        if (job->before) LEVEL(edge)(job->before, drawn + job->terms, row, tile, 0, at, ROW);
        LEVEL(edge)(job, drawn, row, tile, 0, at, ROW);
    }
}

/* Elements element ... element + count - 1 of the site, which lie at `at` in the tensors. */
static void LEVEL(run)(const Job *job, int64_t element, int64_t count, int64_t at) {
    static void (*const ROWS_OF[])(const Job *, const Drawn *, int, int, int64_t, int64_t) = {
        LEVEL(rows_FP32), LEVEL(rows_FP64), LEVEL(rows_BF16), LEVEL(rows_BF16_CARRIED), LEVEL(rows_BF16_SPLIT)};
    Drawn drawn[MOST_TERMS];
    const int64_t end = element + count;
    while (element < end) {
        const int64_t tile = element / TILE * TILE, stop = tile + TILE < end ? tile + TILE : end;
        LEVEL(draw)(drawn, job, tile, element, stop);
        if (job->before) LEVEL(draw)(drawn + job->terms, job->before, tile, element, stop);
        while (element < stop) {
            const int row = (int)(element - tile) / ROW, inside = (int)(element % ROW);
            int64_t done = (stop - tile) / ROW * ROW - (element - tile); /* whole rows, if it begins with one */
            if (inside || done < ROW) {
                done = stop - element < ROW - inside ? stop - element : ROW - inside;
                if (job->before) LEVEL(edge)(job->before, drawn + job->terms, row, tile, inside, at, (int)done);
                LEVEL(edge)(job, drawn, row, tile, inside, at, (int)done);
            } else
                ROWS_OF[job->kind](job, drawn, row, row + (int)(done / ROW), tile, at);
            element += done;
            at += done;
        }
    }
}
#undef OF
#undef ROWS

/* What lies at from ... to - 1 in the tensors. */
static void LEVEL(work)(const Job *job, int64_t from, int64_t to) {
    if (!job->rows) {
        LEVEL(run)(job, job->start + from, to - from, from);
        return;
    }
    while (from < to) {
        const int64_t row = from / job->width, inside = from - row * job->width;
        const int64_t count = job->width - inside < to - from ? job->width - inside : to - from;
        LEVEL(run)(job, job->rows[row] * job->width + inside, count, from);
        from += count;
    }
}

