/* Attention, rung 2: the online softmax. One pass over the keys for each query, without the row of scores (Milakov and
 * Gimelshein 2018, arXiv:1805.02867). With m the largest score so far, and l and o the sums relative to it, key s with
 * the score x takes them to
 *
 *     m' = max(m, x)    c = exp(m − m')    p = exp(x − m')    l' = c l + p    o' = c o + p v[s]
 *
 * and at the end out = o/l. If m does not change, c = 1: when a new largest score comes, everything before it is scaled
 * down, as if it had been relative to the new one from the start.
 *
 * Nothing of size t² exists any more: beside the operands there are d + 2 numbers. The loop ends at the query's own
 * key, so hidden scores cost nothing: 2·t²·d flops and t²/2 exponentials for a head, half of rung 1. And o is a row, so
 * the compiler computes it in vectors.
 *
 * What bounds it: a score is still one chain of d additions, an exponential a call, and every query reads all keys and
 * values before it once more, 8·d bytes for 4·d flops. */
#include <math.h>
#include <stdint.h>

/* out = the attention of one query over `keys` keys. */
static void attend(float *restrict out, const float *restrict q, const float *restrict k, const float *restrict v,
                   int64_t keys, int64_t d) {
    const float scale = (float)(1 / sqrt((double)d));
    float m = -INFINITY, l = 0;
    for (int64_t e = 0; e < d; e++)
        out[e] = 0;
    for (int64_t s = 0; s < keys; s++, k += d, v += d) {
        float score = 0;
        for (int64_t e = 0; e < d; e++)
            score += q[e] * k[e];
        score *= scale;
        float largest = fmaxf(m, score), c = expf(m - largest), p = expf(score - largest);
        for (int64_t e = 0; e < d; e++)
            out[e] = c * out[e] + p * v[e];
        l = c * l + p;
        m = largest;
    }
    for (int64_t e = 0; e < d; e++)
        out[e] /= l;
}

void attention_online_softmax(float *out, const float *q, const float *k, const float *v, int64_t heads, int64_t t,
                              int64_t d) {
    for (int64_t head = 0, at = 0; head < heads; head++, at += t * d)
        for (int64_t i = 0; i < t; i++)
            attend(out + at + i * d, q + at + i * d, k + at, v + at, i + 1, d);
}
