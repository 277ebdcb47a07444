/* Divergences of one shard on CPU: every logit is read once in forward and once in backward, and nothing of the
 * logits' width is stored besides the gradient. The readable form is eager.py; cpu_kernels.py compiles and calls this.
 *
 * Each function takes `rows` tokens of `width` logits (p, q: [rows, width], of any distance between rows), the number
 * of threads that share out the tokens, the temperature T, and fp32 numbers per token. Exponentials are powers of two:
 * e^((x - y) / T) = 2^((x - y) per_unit). Sums run in fp32 over BLOCK columns, then in double, in one order: the same
 * bits for any number of threads. Weight 0 counts for nothing, so -inf may stand in a column on both sides.
 */
#ifndef LOGIT /* once; what follows includes this file again for each dtype */
#define _GNU_SOURCE
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#define BLOCK 256 /* even; an fp32 sum of more is less exact on 4 lanes */
#define LOG2E 1.4426950408889634
#define MIN(a, b) ((a) < (b) ? (a) : (b))

static inline float bits_to_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline uint32_t float_to_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

/* Columns are taken two at a time: those of bf16 that share a word, of fp32 those that are half a block apart. */
typedef uint16_t bf16;
typedef float f32;
typedef struct { float a, b; } pair;

static inline pair load_bf16(const bf16 *x, long j, long half) {
    uint32_t word;
    (void)half, memcpy(&word, x + 2 * j, 4);
    return (pair){bits_to_float(word << 16), bits_to_float(word & 0xffff0000u)};
}
static inline uint32_t rounded(float x) { /* to nearest, ties to even, as torch; NaN stays, but for one of all ones */
    uint32_t bits = float_to_bits(x);
    return bits + 0x7fff + ((bits >> 16) & 1);
}
static inline void store_bf16(bf16 *out, long j, long half, pair x) {
    uint32_t word = rounded(x.a) >> 16 | (rounded(x.b) & 0xffff0000u);
    (void)half, memcpy(out + 2 * j, &word, 4);
}
static inline pair load_f32(const f32 *x, long j, long half) { return (pair){x[j], x[j + half]}; }
static inline void store_f32(f32 *out, long j, long half, pair x) { out[j] = x.a, out[j + half] = x.b; }

/* 2^t for t < 127.5; 0 below -126.5, NaN for NaN; with fused products within 2 units in the last place of 2^t.
 * Branch-free: 2^n times a polynomial in r = t - n, the best of degree 5 that is 1 at 0 (relative error 9.2e-8). */
static inline float exp2_(float t) {
    const float magic = 12583039.0f; /* 1.5 * 2^23 + 127: adding it leaves the exponent's bits of 2^n in the low ones */
    t = t < -127.0f ? -127.0f : t;
    float shifted = t + magic;
    float r = t - (shifted - magic);
    float y = 1.326465918e-3f;
    y = y * r + 9.671566164e-3f;
    y = y * r + 5.550734584e-2f;
    y = y * r + 2.402224118e-1f;
    y = y * r + 6.931469740e-1f;
    y = y * r + 1.0f;
    return y * bits_to_float(float_to_bits(shifted) << 23);
}

/* Sums of 2^((x - reference) per_unit): the reference is a logit that was met, left for far higher ones only. */
typedef struct { float reference; double sum, weighed; } online;

static inline int raise_to(online *all, float peak, float per_unit) {
    if (!((peak - all->reference) * per_unit > 60)) return 0;
    double scale = exp2(((double)all->reference - peak) * per_unit);
    all->sum *= scale, all->weighed = scale == 0 ? 0 : all->weighed * scale, all->reference = peak;
    return 1;
}

static inline float lse(online all, float temperature) {
    return all.sum == 0 ? -INFINITY : (double)all.reference / temperature + log(all.sum);
}

/* softmax(x / T) = 2^((x - shift) per_unit) * factor: what rounding the shift to fp32 loses is in the factor. */
static inline float softmax_shift(float lse, float temperature, float *factor) {
    double exact = (double)lse * temperature;
    float shift = exact;
    *factor *= exp2((shift - exact) * (LOG2E / temperature));
    return shift;
}

static inline float quiet(float x) { return x != x ? NAN : x; } /* a NaN that survives `rounded` */

/* Fresh memory page by page costs as much as a third of the gradient. */
static void ask_for_huge_pages(void *start, long bytes) {
#ifdef MADV_HUGEPAGE
    const uintptr_t huge = 2 << 20, first = ((uintptr_t)start + huge - 1) & -huge;
    const uintptr_t end = ((uintptr_t)start + bytes) & -huge;
    if (first < end) madvise((void *)first, end - first, MADV_HUGEPAGE); /* refused: pages are small */
#else
    (void)start, (void)bytes;
#endif
}

#define JOIN(a, b) a##_##b
#define EXPANDED(a, b) JOIN(a, b)
#define OF(name) EXPANDED(name, LOGIT)

#define LOGIT bf16
#define NOTHING 0xff80 /* -inf */
#include "cpu_kernels.c"
#undef LOGIT
#undef NOTHING
#define LOGIT f32
#define NOTHING -INFINITY
#include "cpu_kernels.c"

#else

/* x, or its copy with one more column that counts for nothing, if columns are odd. */
static inline const LOGIT *OF(even)(const LOGIT *x, long n, LOGIT *copy) {
    if (n % 2 == 0) return x;
    memcpy(copy, x, n * sizeof(LOGIT)), copy[n] = NOTHING;
    return copy;
}

/* p_lse = lse(p / T), mean = E_softmax(p / T)[p / T - q / T], q_lse = lse(q / T). */
void OF(kl_statistics)(const LOGIT *p, long p_stride, const LOGIT *q, long q_stride, long rows, long width, int threads,
                       float temperature, float *p_lse, float *mean, float *q_lse) {
    const float per_unit = LOG2E / temperature;
    #pragma omp parallel for num_threads(threads)
    for (long i = 0; i < rows; i++) {
        online P = {-FLT_MAX, 0, 0}, Q = {-FLT_MAX, 0, 0};
        for (long start = 0; start < width; start += BLOCK) {
            const long n = MIN(BLOCK, width - start), half = (n + 1) / 2;
            LOGIT x_copy[BLOCK], y_copy[BLOCK];
            const LOGIT *xs = OF(even)(p + i * p_stride + start, n, x_copy);
            const LOGIT *ys = OF(even)(q + i * q_stride + start, n, y_copy);
            float x_peak, y_peak, x_sum, y_sum, weighed;
            do {
                const float x_reference = P.reference, y_reference = Q.reference;
                x_peak = y_peak = -INFINITY, x_sum = y_sum = weighed = 0;
                #pragma omp simd reduction(max : x_peak, y_peak) reduction(+ : x_sum, y_sum, weighed)
                for (long j = 0; j < half; j++) {
                    const pair x = OF(load)(xs, j, half), y = OF(load)(ys, j, half);
                    const float x_max = x.a > x.b ? x.a : x.b, y_max = y.a > y.b ? y.a : y.b;
                    const float u = exp2_((x.a - x_reference) * per_unit), v = exp2_((x.b - x_reference) * per_unit);
                    x_peak = x_max > x_peak ? x_max : x_peak;
                    y_peak = y_max > y_peak ? y_max : y_peak;
                    x_sum += u + v;
                    y_sum += exp2_((y.a - y_reference) * per_unit) + exp2_((y.b - y_reference) * per_unit);
                    weighed += u * (u == 0.0f ? 0.0f : x.a - y.a) + v * (v == 0.0f ? 0.0f : x.b - y.b);
                }
            } while (raise_to(&P, x_peak, per_unit) | raise_to(&Q, y_peak, per_unit));
            P.sum += x_sum, P.weighed += weighed, Q.sum += y_sum;
        }
        p_lse[i] = lse(P, temperature), q_lse[i] = lse(Q, temperature);
        mean[i] = P.sum == 0 ? 0 : P.weighed / P.sum / temperature;
    }
}

/* softmax(z) q_scale - softmax(t) p_scale of some columns. */
static inline void OF(forward_kl_columns)(const LOGIT *xs, const LOGIT *ys, long half, float per_unit, float q_shift,
                                          float q_scale, float p_shift, float p_scale, LOGIT *to) {
    #pragma omp simd
    for (long j = 0; j < half; j++) {
        const pair x = OF(load)(xs, j, half), y = OF(load)(ys, j, half);
        const float q_a = exp2_((x.a - q_shift) * per_unit), p_a = exp2_((y.a - p_shift) * per_unit);
        const float q_b = exp2_((x.b - q_shift) * per_unit), p_b = exp2_((y.b - p_shift) * per_unit);
        OF(store)(to, j, half, (pair){q_a * q_scale - p_a * p_scale, q_b * q_scale - p_b * p_scale});
    }
}

/* q (z - t - mean) scale of some columns, q = softmax(z), 0 where q is 0. */
static inline void OF(reverse_kl_columns)(const LOGIT *xs, const LOGIT *ys, long half, float per_unit, float shift,
                                          float scale, float mean, LOGIT *to) {
    #pragma omp simd
    for (long j = 0; j < half; j++) {
        const pair x = OF(load)(xs, j, half), y = OF(load)(ys, j, half);
        const float a = exp2_((x.a - shift) * per_unit), b = exp2_((x.b - shift) * per_unit);
        const float grad_a = a == 0.0f ? 0.0f : (x.a - y.a - mean) * a * scale;
        const float grad_b = b == 0.0f ? 0.0f : (x.b - y.b - mean) * b * scale;
        OF(store)(to, j, half, (pair){grad_a, grad_b});
    }
}

/* 0 where grad is 0, else of forward KL (softmax(z) - softmax(t)) * grad / T, with second = lse(t / T);
 * of reverse KL q (z/T - t/T - mean) * grad / T, with second = mean. */
static void OF(gradient)(int reverse, const LOGIT *z, long z_stride, const LOGIT *t, long t_stride, long rows,
                         long width, int threads, float temperature, const float *z_lse, const float *second,
                         const float *grad, LOGIT *out, long out_stride) {
    const float per_unit = LOG2E / temperature;
    if (out_stride == width) ask_for_huge_pages(out, rows * width * sizeof(LOGIT));
    #pragma omp parallel for num_threads(threads)
    for (long i = 0; i < rows; i++) {
        LOGIT *row = out + i * out_stride;
        if (grad[i] == 0.0f) { memset(row, 0, width * sizeof(LOGIT)); continue; }
        float p_scale = quiet(grad[i]) / temperature, q_scale = reverse ? p_scale / temperature : p_scale;
        const float q_shift = softmax_shift(z_lse[i], temperature, &q_scale);
        const float p_shift = reverse ? 0 : softmax_shift(second[i], temperature, &p_scale);
        for (long start = 0; start < width; start += BLOCK) {
            const long n = MIN(BLOCK, width - start), half = (n + 1) / 2;
            LOGIT x_copy[BLOCK], y_copy[BLOCK], *to = n % 2 ? x_copy : row + start;
            const LOGIT *xs = OF(even)(z + i * z_stride + start, n, x_copy);
            const LOGIT *ys = OF(even)(t + i * t_stride + start, n, y_copy);
            if (reverse) OF(reverse_kl_columns)(xs, ys, half, per_unit, q_shift, q_scale, second[i] * temperature, to);
            else OF(forward_kl_columns)(xs, ys, half, per_unit, q_shift, q_scale, p_shift, p_scale, to);
            if (n % 2) memcpy(row + start, to, n * sizeof(LOGIT));
        }
    }
}

void OF(forward_kl_gradient)(const LOGIT *z, long z_stride, const LOGIT *t, long t_stride, long rows, long width,
                             int threads, float temperature, const float *z_lse, const float *t_lse, const float *grad,
                             LOGIT *out, long out_stride) {
    OF(gradient)(0, z, z_stride, t, t_stride, rows, width, threads, temperature, z_lse, t_lse, grad, out, out_stride);
}

void OF(reverse_kl_gradient)(const LOGIT *z, long z_stride, const LOGIT *t, long t_stride, long rows, long width,
                             int threads, float temperature, const float *z_lse, const float *mean, const float *grad,
                             LOGIT *out, long out_stride) {
    OF(gradient)(1, z, z_stride, t, t_stride, rows, width, threads, temperature, z_lse, mean, grad, out, out_stride);
}

#endif
