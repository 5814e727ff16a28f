/* One walk over float32 values in memory for what several measures need, and one that counts codes.

   Plain C and the stable ABI of Python 3.11. Where this cannot be built, undertow measures with the framework's own
   operations: the same numbers, in three to five walks. The interpreter is free while these run. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <math.h>
#include <stdint.h>

#define CODES 65536
#define TABLES 4
#define PIECE 65536
#define BLOCK 64

/* The loader picks the wider form where the processor has it. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define WIDEST __attribute__((target_clones("avx2", "default")))
#else
#define WIDEST
#endif

typedef struct {
    double sum, absolutes, squares;
    float low, high;
    int64_t zeros;
} Seen;

/* At most PIECE values; sums in double, so that a float's square is exact. */
WIDEST static Seen piece(const float *x, Py_ssize_t n)
{
    double sum = 0, absolutes = 0, squares = 0;
    float low = INFINITY, high = -INFINITY;
    int32_t zeros = 0;
#pragma omp simd reduction(+ : sum, absolutes, squares, zeros) reduction(min : low) reduction(max : high)
    for (Py_ssize_t i = 0; i < n; i++) {
        float v = x[i];
        double d = v;
        sum += d;
        absolutes += fabs(d);
        squares += d * d;
        zeros += v == 0;
        low = v < low ? v : low;
        high = v > high ? v : high;
    }
    return (Seen){sum, absolutes, squares, low, high, zeros};
}

/* What is rounded is added row by row, so that the number of threads changes no bit. */
static Seen walk(const float *x, Py_ssize_t rows, Py_ssize_t n, float *norms, double *sums, int threads)
{
    float low = INFINITY, high = -INFINITY;
    int64_t zeros = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : zeros) reduction(min : low) reduction(max : high)
    for (Py_ssize_t row = 0; row < rows; row++) {
        Seen whole = {0, 0, 0, INFINITY, -INFINITY, 0};
        for (Py_ssize_t start = 0; start < n; start += PIECE) {
            Seen part = piece(x + row * n + start, n - start < PIECE ? n - start : PIECE);
            whole.sum += part.sum;
            whole.absolutes += part.absolutes;
            whole.squares += part.squares;
            zeros += part.zeros;
            low = part.low < low ? part.low : low;
            high = part.high > high ? part.high : high;
        }
        norms[row] = (float)sqrt(whole.squares);
        sums[3 * row] = whole.sum;
        sums[3 * row + 1] = whole.absolutes;
        sums[3 * row + 2] = whole.squares;
    }
    Seen all = {0, 0, 0, low, high, zeros};
    for (Py_ssize_t row = 0; row < rows; row++) {
        all.sum += sums[3 * row];
        all.absolutes += sums[3 * row + 1];
        all.squares += sums[3 * row + 2];
    }
    if (isnan(all.absolutes)) /* comparisons pass over what is not a number */
        all.low = all.high = NAN;
    return all;
}

typedef struct {
    uint32_t low, high;
} Range;

/* The smallest and the largest code of what is not zero, without its sign; low > high where all is zero. */
WIDEST static Range range(const uint32_t *x, Py_ssize_t n)
{
    uint32_t low = UINT32_MAX, high = 0;
#pragma omp simd reduction(min : low) reduction(max : high)
    for (Py_ssize_t i = 0; i < n; i++) {
        uint32_t doubled = x[i] << 1, less = doubled - 1; /* the sign is gone, and zero is the largest */
        low = less < low ? less : low;
        high = doubled > high ? doubled : high;
    }
    return (Range){low == UINT32_MAX ? CODES : (low + 1) >> 17, high >> 17};
}

/* Four tables in turn: equal neighbours, mostly zeros, would wait for each other at one counter. */
static Range fill(const uint32_t *x, Py_ssize_t n, uint32_t *tables)
{
    Range all = {CODES, 0};
    for (Py_ssize_t start = 0; start < n; start += 4096) {
        const uint32_t *some = x + start;
        Py_ssize_t i = 0, size = n - start < 4096 ? n - start : 4096;
        Range these = range(some, size);
        all.low = these.low < all.low ? these.low : all.low;
        all.high = these.high > all.high ? these.high : all.high;
        for (; i + TABLES <= size; i += TABLES)
            for (int t = 0; t < TABLES; t++)
                tables[t * CODES + (some[i + t] >> 16)]++;
        for (; i < size; i++)
            tables[some[i] >> 16]++;
    }
    return all;
}

/* Add up and clear the tables, where codes are: to read all of them would take longer than to count. */
static void tally(const uint32_t *x, Py_ssize_t n, uint32_t *tables, int threads, int64_t *counts)
{
    uint32_t low = CODES, high = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(min : low) reduction(max : high)
    for (int part = 0; part < threads; part++) {
        Py_ssize_t from = n / threads * part, to = part + 1 < threads ? from + n / threads : n;
        Range found = fill(x + from, to - from, tables + (Py_ssize_t)part * TABLES * CODES);
        low = found.low < low ? found.low : low;
        high = found.high > high ? found.high : high;
    }
    for (uint32_t block = 0; block < CODES; block += BLOCK) {
        uint32_t code = block & (CODES / 2 - 1); /* the block of zero holds values always */
        if (code && (code + BLOCK <= low || code > high))
            continue;
        for (int table = 0; table < threads * TABLES; table++) {
            uint32_t *found = tables + (Py_ssize_t)table * CODES + block;
            for (int i = 0; i < BLOCK; i++) {
                counts[block + i] += found[i];
                found[i] = 0;
            }
        }
    }
}

PyDoc_STRVAR(reduce_doc,
"reduce(values, norms, sums, threads) -> (sum, squares, low, high, zeros)\n\n"
"`values`: float32, in the rows that `norms`, float32 (rows,), and `sums`, float64 (rows, 3), are for: they are filled\n"
"with each row's l2 norm, and with its sum, sum of magnitudes and sum of squares. Of all: the sum, the sum of squares,\n"
"the smallest value, the largest, and how many are zero.\n");

static PyObject *reduce(PyObject *self, PyObject *args)
{
    Py_buffer values, norms, sums;
    int threads;
    if (!PyArg_ParseTuple(args, "y*w*w*i:reduce", &values, &norms, &sums, &threads))
        return NULL;
    const Py_ssize_t n = values.len / sizeof(float), rows = norms.len / sizeof(float);
    PyObject *result = NULL;
    if (rows < 1 || n % rows || sums.len != rows * 3 * (Py_ssize_t)sizeof(double) || threads < 1) {
        PyErr_SetString(PyExc_ValueError, "values, norms, sums and threads do not fit together");
    } else {
        Seen seen;
        Py_BEGIN_ALLOW_THREADS
        seen = walk(values.buf, rows, n / rows, norms.buf, sums.buf, threads);
        Py_END_ALLOW_THREADS
        result = Py_BuildValue("ddddL", seen.sum, seen.squares, (double)seen.low, (double)seen.high,
                               (long long)seen.zeros);
    }
    PyBuffer_Release(&values);
    PyBuffer_Release(&norms);
    PyBuffer_Release(&sums);
    return result;
}

PyDoc_STRVAR(count_doc,
"count(values, tables, counts)\n\n"
"Adds to `counts`, int64 (65536,), how often the upper 16 bits of each of `values`, float32, occur. `tables`, uint32\n"
"(threads, 4, 65536), must hold zeros, and does again afterwards.\n");

static PyObject *count(PyObject *self, PyObject *args)
{
    Py_buffer values, tables, counts;
    if (!PyArg_ParseTuple(args, "y*w*w*:count", &values, &tables, &counts))
        return NULL;
    const Py_ssize_t n = values.len / sizeof(uint32_t), most = (Py_ssize_t)1 << 31; /* a counter has 32 bits */
    Py_ssize_t threads = tables.len / (TABLES * CODES * sizeof(uint32_t));
    PyObject *result = NULL;
    if (threads < 1 || threads > 1024 || counts.len != CODES * (Py_ssize_t)sizeof(int64_t)) {
        PyErr_SetString(PyExc_ValueError, "tables or counts have not the right size");
    } else {
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t start = 0; start < n; start += most)
            tally((const uint32_t *)values.buf + start, n - start < most ? n - start : most, tables.buf, (int)threads,
                  counts.buf);
        Py_END_ALLOW_THREADS
        result = Py_NewRef(Py_None);
    }
    PyBuffer_Release(&values);
    PyBuffer_Release(&tables);
    PyBuffer_Release(&counts);
    return result;
}

static PyMethodDef methods[] = {
    {"reduce", reduce, METH_VARARGS, reduce_doc},
    {"count", count, METH_VARARGS, count_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "undertow._walk", "Walks over float32 values.", 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__walk(void)
{
    return PyModuleDef_Init(&module);
}
