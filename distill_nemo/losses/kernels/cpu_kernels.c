/* Divergences of one shard on CPU: every logit is read once in forward and once in backward, and nothing of the
 * logits' width is stored besides the gradient. The readable form is eager.py; cpu_kernels.py compiles and calls this.
 *
 * Each function takes `rows` tokens of `width` logits (p, q: [rows, width], of any distance between rows), the number
 * of threads that share out the tokens, the temperature T, and fp32 numbers per token. Exponentials are powers of two:
 * e^((x - y) / T) = 2^((x - y) per_unit). Sums run in fp32 over BLOCK columns, then in double, in one order: the same
 * bits for any number of threads. Weight 0 has no effect, so -inf may stand in a column on both sides.
 * A log-sum-exp is two numbers, peak and total, as in eager.py.
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

/* Sums of 2^((x - reference) per_unit). The reference is a logit seen before; only a far higher one replaces it. */
typedef struct { float reference, peak; double sum, weighed; } online;
#define NONE_MET {-FLT_MAX, -INFINITY, 0, 0}

/* Raise the reference to a far higher peak; return the difference. Weighed values are distances from it. */
static inline double raise_to(online *all, float peak, float per_unit) {
    const double by = (double)peak - all->reference;
    if (!(by * per_unit > 60)) return 0;
    const double scale = exp2(-by * per_unit);
    all->weighed = scale == 0 ? 0 : (all->weighed - all->sum * by) * scale;
    all->sum *= scale, all->reference = peak;
    return by;
}

/* Height of the peak above the reference. */
static inline double height(online all) {
    return all.peak == -INFINITY ? 0 : (double)all.peak - all.reference;
}

static inline float quiet(float x) { return x != x ? NAN : x; } /* a NaN that survives `rounded` */

/* Ask for huge pages: fresh memory page by page costs as much as a third of the gradient. */
static void ask_for_huge_pages(void *start, long bytes) {
#ifdef MADV_HUGEPAGE
    const uintptr_t huge = 2 << 20, first = ((uintptr_t)start + huge - 1) & -huge;
    const uintptr_t end = ((uintptr_t)start + bytes) & -huge;
    if (first < end) madvise((void *)first, end - first, MADV_HUGEPAGE); /* if refused, pages are small */
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

/* x or, if its number of columns is odd, its copy with one more column of weight 0. */
static inline const LOGIT *OF(even)(const LOGIT *x, long n, LOGIT *copy) {
    if (n % 2 == 0) return x;
    memcpy(copy, x, n * sizeof(LOGIT)), copy[n] = NOTHING;
    return copy;
}

/* Peaks and totals of p / T and q / T, and mean = E_softmax(p / T)[(p - p_peak) / T - (q - q_peak) / T]. */
void OF(kl_statistics)(const LOGIT *p, long p_stride, const LOGIT *q, long q_stride, long rows, long width, int threads,
                       float temperature, float *p_peak, float *p_total, float *q_peak, float *q_total, float *mean) {
    const float per_unit = LOG2E / temperature;
    #pragma omp parallel for num_threads(threads)
    for (long i = 0; i < rows; i++) {
        online P = NONE_MET, Q = NONE_MET;
        for (long start = 0; start < width; start += BLOCK) {
            const long n = MIN(BLOCK, width - start), half = (n + 1) / 2;
            LOGIT x_copy[BLOCK], y_copy[BLOCK];
            const LOGIT *xs = OF(even)(p + i * p_stride + start, n, x_copy);
            const LOGIT *ys = OF(even)(q + i * q_stride + start, n, y_copy);
            float x_peak, y_peak, x_sum, y_sum, weighed;
            double x_raised, y_raised;
            do {
                const float x_reference = P.reference, y_reference = Q.reference;
                x_peak = y_peak = -INFINITY, x_sum = y_sum = weighed = 0;
                #pragma omp simd reduction(max : x_peak, y_peak) reduction(+ : x_sum, y_sum, weighed)
                for (long j = 0; j < half; j++) {
                    const pair x = OF(load)(xs, j, half), y = OF(load)(ys, j, half);
                    const float x_max = x.a > x.b ? x.a : x.b, y_max = y.a > y.b ? y.a : y.b;
                    const pair c = {x.a - x_reference, x.b - x_reference}, d = {y.a - y_reference, y.b - y_reference};
                    const float u = exp2_(c.a * per_unit), v = exp2_(c.b * per_unit);
                    x_peak = x_max > x_peak ? x_max : x_peak;
                    y_peak = y_max > y_peak ? y_max : y_peak;
                    x_sum += u + v;
                    y_sum += exp2_(d.a * per_unit) + exp2_(d.b * per_unit);
                    weighed += u * (u == 0.0f ? 0.0f : c.a - d.a) + v * (v == 0.0f ? 0.0f : c.b - d.b);
                }
                x_raised = raise_to(&P, x_peak, per_unit), y_raised = raise_to(&Q, y_peak, per_unit);
                P.weighed += P.sum * y_raised;
            } while (x_raised > 0 || y_raised > 0);
            P.sum += x_sum, P.weighed += weighed, Q.sum += y_sum;
            P.peak = x_peak > P.peak ? x_peak : P.peak, Q.peak = y_peak > Q.peak ? y_peak : Q.peak;
        }
        p_peak[i] = P.sum != P.sum ? NAN : P.peak, p_total[i] = P.sum * exp2(-height(P) * per_unit);
        q_peak[i] = Q.sum != Q.sum ? NAN : Q.peak, q_total[i] = Q.sum * exp2(-height(Q) * per_unit);
        mean[i] = P.sum == 0 ? 0 : (P.weighed / P.sum - height(P) + height(Q)) / temperature;
    }
}

/* Peak and total of z / T, with the bits of kl_statistics. */
void OF(log_sum_exp)(const LOGIT *z, long z_stride, long rows, long width, int threads, float temperature, float *peak,
                     float *total) {
    const float per_unit = LOG2E / temperature;
    #pragma omp parallel for num_threads(threads)
    for (long i = 0; i < rows; i++) {
        online Z = NONE_MET;
        for (long start = 0; start < width; start += BLOCK) {
            const long n = MIN(BLOCK, width - start), half = (n + 1) / 2;
            LOGIT copy[BLOCK];
            const LOGIT *xs = OF(even)(z + i * z_stride + start, n, copy);
            float x_peak, x_sum;
            do {
                const float reference = Z.reference;
                x_peak = -INFINITY, x_sum = 0;
                #pragma omp simd reduction(max : x_peak) reduction(+ : x_sum)
                for (long j = 0; j < half; j++) {
                    const pair x = OF(load)(xs, j, half);
                    const float x_max = x.a > x.b ? x.a : x.b;
                    x_peak = x_max > x_peak ? x_max : x_peak;
                    x_sum += exp2_((x.a - reference) * per_unit) + exp2_((x.b - reference) * per_unit);
                }
            } while (raise_to(&Z, x_peak, per_unit) > 0);
            Z.sum += x_sum;
            Z.peak = x_peak > Z.peak ? x_peak : Z.peak;
        }
        peak[i] = Z.sum != Z.sum ? NAN : Z.peak, total[i] = Z.sum * exp2(-height(Z) * per_unit);
    }
}

/* scale e^((z - peak) / T) + other_scale e^(z - other_peak); a term with scale 0 is 0. `out` may be z. */
void OF(softmax_gradient)(const LOGIT *z, long z_stride, long rows, long width, int threads, float temperature,
                          const float *peak, const float *scale, const float *other_peak, const float *other_scale,
                          LOGIT *out, long out_stride) {
    const float per_unit = LOG2E / temperature, other_unit = LOG2E;
    #pragma omp parallel for num_threads(threads)
    for (long i = 0; i < rows; i++) {
        LOGIT *row = out + i * out_stride;
        const float s = scale[i], t = other_scale[i], p = s == 0 ? 0 : peak[i], q = t == 0 ? 0 : other_peak[i];
        if (s == 0 && t == 0) { memset(row, 0, width * sizeof(LOGIT)); continue; }
        for (long start = 0; start < width; start += BLOCK) {
            const long n = MIN(BLOCK, width - start), half = (n + 1) / 2;
            LOGIT copy[BLOCK], *to = n % 2 ? copy : row + start;
            const LOGIT *xs = OF(even)(z + i * z_stride + start, n, copy);
            if (t == 0) {
                #pragma omp simd
                for (long j = 0; j < half; j++) {
                    const pair x = OF(load)(xs, j, half);
                    OF(store)(to, j, half, (pair){exp2_((x.a - p) * per_unit) * s, exp2_((x.b - p) * per_unit) * s});
                }
            } else {
                #pragma omp simd
                for (long j = 0; j < half; j++) {
                    const pair x = OF(load)(xs, j, half);
                    const float a = exp2_((x.a - q) * other_unit) * t, b = exp2_((x.b - q) * other_unit) * t;
                    OF(store)(to, j, half, (pair){s == 0 ? a : exp2_((x.a - p) * per_unit) * s + a,
                                                  s == 0 ? b : exp2_((x.b - p) * per_unit) * s + b});
                }
            }
            if (n % 2) memcpy(row + start, to, n * sizeof(LOGIT));
        }
    }
}

/* e^((z - z_peak) / T) q_scale - e^((t - t_peak) / T) p_scale of some columns. */
static inline void OF(forward_kl_columns)(const LOGIT *xs, const LOGIT *ys, long half, float per_unit, float z_peak,
                                          float q_scale, float t_peak, float p_scale, LOGIT *to) {
    #pragma omp simd
    for (long j = 0; j < half; j++) {
        const pair x = OF(load)(xs, j, half), y = OF(load)(ys, j, half);
        const float q_a = exp2_((x.a - z_peak) * per_unit), p_a = exp2_((y.a - t_peak) * per_unit);
        const float q_b = exp2_((x.b - z_peak) * per_unit), p_b = exp2_((y.b - t_peak) * per_unit);
        OF(store)(to, j, half, (pair){q_a * q_scale - p_a * p_scale, q_b * q_scale - p_b * p_scale});
    }
}

/* w ((z - z_peak) - (t - t_peak) - mean) scale of some columns, w = e^((z - z_peak) / T), 0 where w is 0. */
static inline void OF(reverse_kl_columns)(const LOGIT *xs, const LOGIT *ys, long half, float per_unit, float z_peak,
                                          float scale, float t_peak, float mean, LOGIT *to) {
    #pragma omp simd
    for (long j = 0; j < half; j++) {
        const pair x = OF(load)(xs, j, half), y = OF(load)(ys, j, half);
        const pair c = {x.a - z_peak, x.b - z_peak}, d = {y.a - t_peak, y.b - t_peak};
        const float a = exp2_(c.a * per_unit), b = exp2_(c.b * per_unit);
        const float grad_a = a == 0.0f ? 0.0f : (c.a - d.a - mean) * a * scale;
        const float grad_b = b == 0.0f ? 0.0f : (c.b - d.b - mean) * b * scale;
        OF(store)(to, j, half, (pair){grad_a, grad_b});
    }
}

/* 0 where grad is 0, else of forward KL (softmax(z / T) - softmax(t / T)) * grad / T, with second = t_total;
 * of reverse KL softmax(z / T) ((z - z_peak) / T - (t - t_peak) / T - mean) * grad / T, with second = mean. */
static void OF(gradient)(int reverse, const LOGIT *z, long z_stride, const LOGIT *t, long t_stride, long rows,
                         long width, int threads, float temperature, const float *z_peak, const float *z_total,
                         const float *t_peak, const float *second, const float *grad, LOGIT *out, long out_stride) {
    const float per_unit = LOG2E / temperature;
    if (out_stride == width) ask_for_huge_pages(out, rows * width * sizeof(LOGIT));
    #pragma omp parallel for num_threads(threads)
    for (long i = 0; i < rows; i++) {
        LOGIT *row = out + i * out_stride;
        if (grad[i] == 0.0f) { memset(row, 0, width * sizeof(LOGIT)); continue; }
        const double scale = (double)quiet(grad[i]) / temperature, q_scale = scale / z_total[i];
        for (long start = 0; start < width; start += BLOCK) {
            const long n = MIN(BLOCK, width - start), half = (n + 1) / 2;
            LOGIT x_copy[BLOCK], y_copy[BLOCK], *to = n % 2 ? x_copy : row + start;
            const LOGIT *xs = OF(even)(z + i * z_stride + start, n, x_copy);
            const LOGIT *ys = OF(even)(t + i * t_stride + start, n, y_copy);
            if (reverse) OF(reverse_kl_columns)(xs, ys, half, per_unit, z_peak[i], q_scale / temperature, t_peak[i],
                                                second[i] * temperature, to);
            else OF(forward_kl_columns)(xs, ys, half, per_unit, z_peak[i], q_scale, t_peak[i], scale / second[i], to);
            if (n % 2) memcpy(row + start, to, n * sizeof(LOGIT));
        }
    }
}

void OF(forward_kl_gradient)(const LOGIT *z, long z_stride, const LOGIT *t, long t_stride, long rows, long width,
                             int threads, float temperature, const float *z_peak, const float *z_total,
                             const float *t_peak, const float *t_total, const float *grad, LOGIT *out, long out_stride) {
    OF(gradient)(0, z, z_stride, t, t_stride, rows, width, threads, temperature, z_peak, z_total, t_peak, t_total, grad,
                 out, out_stride);
}

void OF(reverse_kl_gradient)(const LOGIT *z, long z_stride, const LOGIT *t, long t_stride, long rows, long width,
                             int threads, float temperature, const float *z_peak, const float *z_total,
                             const float *t_peak, const float *mean, const float *grad, LOGIT *out, long out_stride) {
    OF(gradient)(1, z, z_stride, t, t_stride, rows, width, threads, temperature, z_peak, z_total, t_peak, mean, grad,
                 out, out_stride);
}

#endif
