/* Values of bf16 tensors read and written, and their moments, included once for each instruction set. */

/* Values of elements from ... to - 1: the stored numbers with the carried bits, or (carried NULL) alone. */
static void LEVEL(read)(const Values *job, int64_t from, int64_t to) {
    const uint16_t *RESTRICT stored = job->stored;
    const int16_t *RESTRICT carried = job->carried;
    float *RESTRICT values = job->values;
    if (carried)
        for (int64_t i = from; i < to; i++)
            values[i] = value_of(((uint32_t)stored[i] << 16) + (uint32_t)(int32_t)carried[i]);
    else
        for (int64_t i = from; i < to; i++) values[i] = value_of((uint32_t)stored[i] << 16);
}

/* The nearest bf16, halves away from zero: then the low half of the bits is the rest, as a signed number. */
static void LEVEL(write)(const Values *job, int64_t from, int64_t to) {
    uint16_t *RESTRICT stored = job->stored;
    int16_t *RESTRICT carried = job->carried;
    const float *RESTRICT values = job->values;
    for (int64_t i = from; i < to; i++) {
        const uint32_t bits = bits_of(values[i]);
        stored[i] = (uint16_t)((bits + 0x8000) >> 16);
        carried[i] = (int16_t)bits;
    }
}

/* Sums of x - pivot and of its square over one piece: a tree of rows, neighbours added first, and then of their columns,
   halves added. What a short piece lacks counts as 0, which changes no sum. As kernels/moments.py. */
static void LEVEL(moments)(const Moments *job, int64_t piece) {
    double level[2][LEVELS][ROW];
    const int64_t from = piece * PIECE, left = job->count - from, count = left < PIECE ? left : PIECE;
    const int64_t rows = (count + ROW - 1) / ROW;
    double sum[2][ROW] = {{0}};
    for (int64_t row = 0; row < rows; row++) {
        const int64_t at = from + row * ROW;
        const int here = count - row * ROW < ROW ? (int)(count - row * ROW) : ROW;
        double x[2][ROW];
        if (here < ROW) memset(x, 0, sizeof x);
        if (job->wide)
            for (int i = 0; i < here; i++) x[0][i] = ((const double *)job->values)[at + i] - job->pivot;
        else
            for (int i = 0; i < here; i++) x[0][i] = (double)((const float *)job->values)[at + i] - job->pivot;
        for (int i = 0; i < here; i++) x[1][i] = x[0][i] * x[0][i];
        int depth = 0;
        for (; row >> depth & 1; depth++)
            for (int k = 0; k < 2; k++)
                for (int i = 0; i < ROW; i++) x[k][i] += level[k][depth][i];
        for (int k = 0; k < 2; k++) memcpy(level[k][depth], x[k], sizeof x[k]);
    }
    for (int depth = 0; depth < LEVELS; depth++)
        if (rows >> depth & 1)
            for (int k = 0; k < 2; k++)
                for (int i = 0; i < ROW; i++) sum[k][i] += level[k][depth][i];
    for (int k = 0; k < 2; k++) {
        for (int half = ROW / 2; half; half /= 2)
            for (int i = 0; i < half; i++) sum[k][i] += sum[k][i + half];
        job->sums[2 * piece + k] = sum[k][0];
    }
}
