/* Divergences of one shard on CPU: every logit is read once in forward and once in backward, and nothing of the
 * logits' width is stored besides the gradient. The readable form is eager.py; cpu_kernels.py compiles and calls this.
 *
 * Each function takes `rows` tokens of `width` logits (p, q: [rows, width], of any distance between rows), fp32
 * numbers per token, and the temperature T. Sums run in fp32 over BLOCK columns, then in double, in one order: the
 * same bits for any number of threads. Weight 0 counts for nothing, so -inf may stand in a column on both sides.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 128
#define MIN(a, b) ((a) < (b) ? (a) : (b))

static inline float bits_to_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline uint32_t float_to_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

typedef uint16_t bf16;
static inline float load_bf16(bf16 x) { return bits_to_float((uint32_t)x << 16); }
static inline bf16 store_bf16(float x) { /* to nearest, ties to even, as torch */
    uint32_t bits = float_to_bits(x);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return x == x ? (bf16)rounded : (bf16)0x7fc0;
}
static inline float load_f32(float x) { return x; }
static inline float store_f32(float x) { return x; }

/* e^x for x <= 88; 0 below -87.3, NaN for NaN; with fused products within 2 units in the last place (4 below -20).
 * Branch-free: 2^n times a polynomial in r = x - n ln 2, the best of degree 5 that is 1 at 0 (relative error 9.2e-8). */
static inline float exp_(float x) {
    const float magic = 12583039.0f; /* 1.5 * 2^23 + 127: adding it leaves the exponent's bits of 2^n in the low ones */
    float shifted = x * 1.44269504088896341f + magic;
    float r = x - (shifted - magic) * 0.693147180559945309f;
    float y = 8.290272206e-3f;
    y = y * r + 4.189816117e-2f;
    y = y * r + 1.666763872e-1f;
    y = y * r + 4.999914765e-1f;
    y = y * r + 9.999997020e-1f;
    y = y * r + 1.0f;
    y = y * bits_to_float(float_to_bits(shifted) << 23);
    return x < -87.3f ? 0.0f : y;
}

/* log-sum-exp kept as sum * e^peak, with a second sum of the same scale: merged block by block. */
typedef struct { double peak, sum, weighed; } online;

static inline void merge(online *all, double peak, double sum, double weighed) {
    if (peak > all->peak) {
        double scale = exp(all->peak - peak);
        all->sum *= scale, all->weighed *= scale, all->peak = peak;
    }
    double scale = exp(peak - all->peak);
    all->sum += sum * scale, all->weighed += weighed * scale;
}

#define KERNELS(T, SUFFIX)                                                                                             \
/* p_lse = lse(p / T), mean = E_softmax(p / T)[p / T - q / T], q_lse = lse(q / T). */                                  \
void kl_statistics_##SUFFIX(const T *p, long p_stride, const T *q, long q_stride, long rows, long width,               \
                            float temperature, float *p_lse, float *mean, float *q_lse) {                              \
    const float inverse = 1.0f / temperature; /* as torch divides by a number on CUDA */                               \
    for (long i = 0; i < rows; i++, p += p_stride, q += q_stride) {                                                    \
        online P = {-1e300, 0, 0}, Q = {-1e300, 0, 0};                                                                 \
        for (long start = 0; start < width; start += BLOCK) {                                                          \
            const long n = MIN(BLOCK, width - start);                                                                  \
            float x[BLOCK], y[BLOCK], x_peak = -3.4e38f, y_peak = -3.4e38f, x_sum = 0, y_sum = 0, weighed = 0;         \
            for (long j = 0; j < n; j++) {                                                                             \
                x[j] = load_##SUFFIX(p[start + j]) * inverse;                                                          \
                y[j] = load_##SUFFIX(q[start + j]) * inverse;                                                          \
            }                                                                                                          \
            _Pragma("omp simd reduction(max : x_peak, y_peak)")                                                        \
            for (long j = 0; j < n; j++) {                                                                             \
                x_peak = x[j] > x_peak ? x[j] : x_peak;                                                                \
                y_peak = y[j] > y_peak ? y[j] : y_peak;                                                                \
            }                                                                                                          \
            _Pragma("omp simd reduction(+ : x_sum, y_sum, weighed)")                                                   \
            for (long j = 0; j < n; j++) {                                                                             \
                float w = exp_(x[j] - x_peak), d = x[j] - y[j];                                                        \
                x_sum += w;                                                                                            \
                y_sum += exp_(y[j] - y_peak);                                                                          \
                weighed += w == 0.0f ? 0.0f : w * d;                                                                   \
            }                                                                                                          \
            merge(&P, x_peak, x_sum, weighed);                                                                         \
            merge(&Q, y_peak, y_sum, 0);                                                                               \
        }                                                                                                              \
        p_lse[i] = P.sum == 0 ? -INFINITY : P.peak + log(P.sum);                                                       \
        mean[i] = P.sum == 0 ? 0 : P.weighed / P.sum;                                                                  \
        q_lse[i] = Q.sum == 0 ? -INFINITY : Q.peak + log(Q.sum);                                                       \
    }                                                                                                                  \
}                                                                                                                      \
/* gradient = (softmax(z) - softmax(t)) * grad / T, 0 where grad is 0. */                                              \
void forward_kl_gradient_##SUFFIX(const T *z, long z_stride, const T *t, long t_stride, long rows, long width,         \
                                  float temperature, const float *z_lse, const float *t_lse, const float *grad,        \
                                  T *out, long out_stride) {                                                           \
    const float inverse = 1.0f / temperature; /* as torch divides by a number on CUDA */                               \
    for (long i = 0; i < rows; i++, z += z_stride, t += t_stride, out += out_stride) {                                 \
        const float scale = grad[i] * inverse, a_lse = z_lse[i], b_lse = t_lse[i];                                     \
        if (grad[i] == 0.0f) { memset(out, 0, width * sizeof(T)); continue; }                                          \
        _Pragma("omp simd")                                                                                            \
        for (long j = 0; j < width; j++) {                                                                             \
            float q = exp_(load_##SUFFIX(z[j]) * inverse - a_lse);                                                     \
            float p = exp_(load_##SUFFIX(t[j]) * inverse - b_lse);                                                     \
            out[j] = store_##SUFFIX((q - p) * scale);                                                                  \
        }                                                                                                              \
    }                                                                                                                  \
}                                                                                                                      \
/* gradient = q (z/T - t/T - mean) * grad / T, q = softmax(z), 0 where grad or q is 0. */                              \
void reverse_kl_gradient_##SUFFIX(const T *z, long z_stride, const T *t, long t_stride, long rows, long width,         \
                                  float temperature, const float *z_lse, const float *mean, const float *grad,         \
                                  T *out, long out_stride) {                                                           \
    const float inverse = 1.0f / temperature; /* as torch divides by a number on CUDA */                               \
    for (long i = 0; i < rows; i++, z += z_stride, t += t_stride, out += out_stride) {                                 \
        const float scale = grad[i] * inverse, a_lse = z_lse[i], shift = mean[i];                                      \
        if (grad[i] == 0.0f) { memset(out, 0, width * sizeof(T)); continue; }                                          \
        _Pragma("omp simd")                                                                                            \
        for (long j = 0; j < width; j++) {                                                                             \
            float a = load_##SUFFIX(z[j]) * inverse, b = load_##SUFFIX(t[j]) * inverse;                                \
            float q = exp_(a - a_lse);                                                                                 \
            out[j] = store_##SUFFIX(q == 0.0f ? 0.0f : (a - b - shift) * q * scale);                                   \
        }                                                                                                              \
    }                                                                                                                  \
}

KERNELS(bf16, bf16)
KERNELS(float, f32)
