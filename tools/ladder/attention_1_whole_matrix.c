/* Attention, rung 1: the whole matrix. The equation of Vaswani et al. 2017 (arXiv:1706.03762) as it stands, for each
 * head, causal: query i sees the keys 0 … i.
 *
 *     score[i, s] = q[i] · k[s] / √d,  −∞ for s > i        p = softmax(score) along s        out = p V
 *
 * q, k, v, out are (heads, t, d), dense. The matrices have t² elements: 4 MiB a head at t = 1024.
 *
 * Flops 4·t²·d and t² exponentials for a head, half of them for nothing, since half of the scores are hidden. Bytes:
 * the scores go out to memory and come back three times, 24·t², where q, k, v and out have only 16·t·d: that is what
 * makes attention slow and large in a framework without a kernel of its own for it. Here the arithmetic is slow too:
 * each score is one chain of additions, as in rung 1 of GEMM, and each exponential a call of the C library. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

static void attend(float *out, const float *q, const float *k, const float *v, float *p, int64_t t, int64_t d) {
    const float scale = (float)(1 / sqrt((double)d));
    for (int64_t i = 0; i < t; i++)
        for (int64_t s = 0; s < t; s++) {
            float score = 0;
            for (int64_t e = 0; e < d; e++)
                score += q[i * d + e] * k[s * d + e];
            p[i * t + s] = s <= i ? scale * score : -INFINITY;
        }
    for (int64_t i = 0; i < t; i++) {
        float largest = -INFINITY, sum = 0; /* exp(score − largest) cannot overflow */
        for (int64_t s = 0; s < t; s++)
            largest = fmaxf(largest, p[i * t + s]);
        for (int64_t s = 0; s < t; s++)
            sum += p[i * t + s] = expf(p[i * t + s] - largest);
        for (int64_t s = 0; s < t; s++)
            p[i * t + s] /= sum;
    }
    for (int64_t i = 0; i < t; i++)
        for (int64_t e = 0; e < d; e++) {
            float sum = 0;
            for (int64_t s = 0; s < t; s++)
                sum += p[i * t + s] * v[s * d + e];
            out[i * d + e] = sum;
        }
}

void attention_whole_matrix(float *out, const float *q, const float *k, const float *v, int64_t heads, int64_t t,
                            int64_t d) {
    float *p = malloc((size_t)(t * t) * sizeof(float));
    if (!p)
        abort();
    for (int64_t head = 0, at = 0; head < heads; head++, at += t * d)
        attend(out + at, q + at, k + at, v + at, p, t, d);
    free(p);
}
