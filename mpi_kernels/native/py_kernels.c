/* What Python sees of kernels.c: the type Pass and the instruction sets of this machine. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <string.h>

#include "kernels.h"
#include "py_kernels.h"

#define MOST_PIXELS ((int64_t)1 << 31)

typedef struct {
    PyObject_HEAD nat_pass *pass;
    Py_buffer *buffers; /* arrays that are filled, held until the end */
    size_t buffer_count;
    int kind;
} Pass;

static PyTypeObject pass_type;

nat_pass *nat_pass_of(PyObject *object)
{
    if (!PyObject_TypeCheck(object, &pass_type)) {
        PyErr_Format(PyExc_TypeError, "not a Pass: %.100s", Py_TYPE(object)->tp_name);
        return NULL;
    }
    return ((Pass *)object)->pass;
}

/* ---- instruction sets ---- */

static size_t all_ops(const struct nat_ops **ops)
{
    size_t n = 0;
#ifdef NAT_X86
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))
        ops[n++] = &nat_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        ops[n++] = &nat_avx2;
#endif
    ops[n++] = &nat_portable;
    return n;
}

static const struct nat_ops *find_ops(const char *name)
{
    const struct nat_ops *ops[3];
    size_t n = all_ops(ops);
    for (size_t i = 0; i < n; i++)
        if (!strcmp(name, "auto") || !strcmp(name, ops[i]->name))
            return ops[i];
    PyErr_Format(PyExc_ValueError, "kernel '%.40s' is not to be had on this machine", name);
    return NULL;
}

static PyObject *kernels(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    const struct nat_ops *ops[3];
    size_t n = all_ops(ops);
    PyObject *names = PyTuple_New((Py_ssize_t)n);
    for (size_t i = 0; names && i < n; i++) {
        PyObject *name = PyUnicode_FromString(ops[i]->name);
        if (!name)
            Py_CLEAR(names);
        else
            PyTuple_SET_ITEM(names, (Py_ssize_t)i, name);
    }
    return names;
}

/* ---- arrays ---- */

/* 'b' bool, 'i' signed, 'u' unsigned, 'f' float, of a buffer in native byte order; 0: something else. */
static char letter_of(const Py_buffer *buffer)
{
    const char *format = buffer->format ? buffer->format : "B";
    if (*format == '@' || *format == '=' || *format == (PY_LITTLE_ENDIAN ? '<' : '>'))
        format++;
    if (!*format || format[1])
        return 0;
    return *format == '?'               ? 'b'
           : strchr("bhilqn", *format)  ? 'i'
           : strchr("BHILQN", *format)  ? 'u'
           : strchr("fd", *format)      ? 'f'
                                        : 0;
}

static int is_type(const Py_buffer *buffer, const char *type)
{
    return letter_of(buffer) == type[0] && buffer->itemsize == type[1] - '0';
}

/* An array in C order, filled from here if `writable`; what is wrong is named.  0, or -1. */
static int get(PyObject *object, Py_buffer *buffer, int writable, const char *name)
{
    int flags = PyBUF_FORMAT | PyBUF_C_CONTIGUOUS | (writable ? PyBUF_WRITABLE : 0);
    if (!PyObject_GetBuffer(object, buffer, flags))
        return 0;
    if (PyErr_ExceptionMatches(PyExc_BufferError) || PyErr_ExceptionMatches(PyExc_ValueError)) {
        PyErr_Clear();
        PyErr_Format(PyExc_ValueError, "%s: not %san array in C order", name, writable ? "a writable " : "");
    }
    return -1;
}

static int check(const Py_buffer *buffer, const char *name, const char *type, int64_t items)
{
    if (!is_type(buffer, type)) {
        const char *format = buffer->format ? buffer->format : "B";
        PyErr_Format(PyExc_TypeError, "%s: items '%.20s', not %c%c", name, format, type[0], type[1]);
        return -1;
    }
    if (buffer->len / buffer->itemsize != items) {
        PyErr_Format(PyExc_ValueError, "%s: %zd items, not %lld", name, buffer->len / buffer->itemsize,
                     (long long)items);
        return -1;
    }
    return 0;
}

/* An array that is filled; held by the pass.  NULL with an exception set. */
static void *output(Pass *self, PyObject *object, const char *name, const char *type, int64_t items)
{
    Py_buffer *all = PyMem_Realloc(self->buffers, (self->buffer_count + 1) * sizeof *all);
    if (!all)
        return PyErr_NoMemory();
    self->buffers = all;
    Py_buffer *buffer = &all[self->buffer_count];
    if (get(object, buffer, 1, name))
        return NULL;
    self->buffer_count++;
    return check(buffer, name, type, items) ? NULL : buffer->buf;
}

/* ---- terms ---- */

static const char *whole_type(const Pass *self)
{
    return self->kind == NAT_F32 ? "f8" : self->kind == NAT_I16 ? "i8" : "u8";
}

static int failed(int error, const char *name)
{
    if (error == NAT_NO_MEMORY)
        PyErr_NoMemory();
    else if (error)
        PyErr_Format(PyExc_ValueError, "%s: a sum could leave 63 bits", name);
    return error ? -1 : 0;
}

static int want_images(Pass *self, PyObject *sum, PyObject *squares, PyObject *max)
{
    static const char *const pixel[] = {"u1", "u2", "u4", "i2", "f4"};
    nat_pass *pass = self->pass;
    const int64_t pixels = (int64_t)pass->pixels, pair = 2 * pixels;
    const int floats = self->kind == NAT_F32;
    uint64_t bound;
    if (sum != Py_None && __builtin_mul_overflow((uint64_t)pass->rows, pass->largest, &bound))
        return failed(NAT_OVERFLOW, "sum");
    if (sum != Py_None && bound >> 63)
        return failed(NAT_OVERFLOW, "sum");
    if (sum != Py_None && !(pass->sum = output(self, sum, "sum", whole_type(self), floats ? pair : pixels)))
        return -1;
    if (squares != Py_None && !(pass->squares = output(self, squares, "squares", floats ? "f8" : "u8", pair)))
        return -1;
    if (max != Py_None && !(pass->max = output(self, max, "max", pixel[self->kind], pixels)))
        return -1;
    return 0;
}

static int want_level(Pass *self, PyObject *level)
{
    Py_buffer buffer;
    if (level == Py_None)
        return 0;
    if (self->kind != NAT_F32 || !self->pass->squares) {
        PyErr_SetString(PyExc_ValueError, "level: for squares of float32");
        return -1;
    }
    if (get(level, &buffer, 0, "level"))
        return -1;
    int failure = check(&buffer, "level", "f8", (int64_t)self->pass->pixels);
    for (size_t p = 0; !failure && p < self->pass->pixels; p++)
        if (!isfinite(((const double *)buffer.buf)[p])) {
            PyErr_Format(PyExc_ValueError, "level: not finite at pixel %zu", p);
            failure = -1;
        }
    failure = failure ? failure : failed(nat_pass_level(self->pass, buffer.buf), "level");
    PyBuffer_Release(&buffer);
    return failure;
}

static int weight_type(const Py_buffer *buffer)
{
    static const char *const types[] = {"b1", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f8"};
    for (int i = 0; i < 10; i++)
        if (is_type(buffer, types[i]))
            return i;
    PyErr_Format(PyExc_TypeError, "masks: weights '%.20s'", buffer->format ? buffer->format : "B");
    return -1;
}

static int want_masks(Pass *self, PyObject *item)
{
    PyObject *weights, *out;
    Py_buffer buffer;
    if (!PyArg_ParseTuple(item, "OO;masks are pairs (weights, out)", &weights, &out))
        return -1;
    if (get(weights, &buffer, 0, "weights"))
        return -1;
    int type = weight_type(&buffer), failure = type < 0;
    const int64_t pixels = (int64_t)self->pass->pixels, count = buffer.ndim ? buffer.shape[0] : 0;
    if (!failure && buffer.len / buffer.itemsize != count * pixels) {
        PyErr_SetString(PyExc_ValueError, "masks: weights are not (k, pixels)");
        failure = 1;
    }
    if (!failure) {
        char letter = letter_of(&buffer);
        const char *sums = letter == 'f' ? "f8" : letter == 'i' && self->kind != NAT_F32 ? "i8" : whole_type(self);
        void *filled = output(self, out, "masks", sums, count * self->pass->rows);
        const enum nat_weight weight = (enum nat_weight)type;
        failure = !filled || failed(nat_pass_masks_add(self->pass, buffer.buf, weight, (size_t)count, filled), "masks");
    }
    PyBuffer_Release(&buffer);
    return failure ? -1 : 0;
}

static int labels_fit(const Py_buffer *buffer, int64_t pixels, long long regions)
{
    if (check(buffer, "labels", "i4", pixels))
        return 0;
    for (int64_t p = 0; p < pixels; p++)
        if (((const int32_t *)buffer->buf)[p] >= regions) {
            PyErr_Format(PyExc_ValueError, "labels: %d at pixel %lld, regions: %lld", ((const int32_t *)buffer->buf)[p],
                         (long long)p, regions);
            return 0;
        }
    return 1;
}

static int want_labels(Pass *self, PyObject *item)
{
    PyObject *labels, *out;
    long long regions;
    Py_buffer buffer;
    if (!PyArg_ParseTuple(item, "OLO;labels are triples (labels, regions, out)", &labels, &regions, &out))
        return -1;
    if (regions < 0 || regions >= MOST_PIXELS / 2) {
        PyErr_Format(PyExc_ValueError, "labels: %lld regions", regions);
        return -1;
    }
    if (get(labels, &buffer, 0, "labels"))
        return -1;
    int failure = !labels_fit(&buffer, (int64_t)self->pass->pixels, regions);
    if (!failure) {
        void *filled = output(self, out, "labels", whole_type(self), self->pass->rows * regions);
        failure = !filled || failed(nat_pass_labels_add(self->pass, buffer.buf, regions, filled), "labels");
    }
    PyBuffer_Release(&buffer);
    return failure ? -1 : 0;
}

static int want_moments(Pass *self, PyObject *item)
{
    PyObject *mask, *out;
    Py_buffer buffer = {0};
    if (!PyArg_ParseTuple(item, "OO;moments are pairs (mask or None, out)", &mask, &out))
        return -1;
    if (mask != Py_None && get(mask, &buffer, 0, "moments"))
        return -1;
    int failure = mask != Py_None && check(&buffer, "moments", "b1", (int64_t)self->pass->pixels);
    if (!failure) {
        void *filled = output(self, out, "moments", whole_type(self), self->pass->rows * 3);
        failure = !filled || failed(nat_pass_moments_add(self->pass, buffer.buf, filled), "moments");
    }
    if (buffer.obj)
        PyBuffer_Release(&buffer);
    return failure ? -1 : 0;
}

static int want_each(Pass *self, PyObject *items, int (*want)(Pass *, PyObject *), const char *name)
{
    PyObject *all = items ? PySequence_Tuple(items) : PyTuple_New(0);
    int failure = all ? 0 : -1;
    for (Py_ssize_t i = 0; !failure && i < PyTuple_GET_SIZE(all); i++) {
        PyObject *item = PySequence_Tuple(PyTuple_GET_ITEM(all, i));
        failure = item ? want(self, item) : -1;
        Py_XDECREF(item);
    }
    if (failure && !PyErr_Occurred())
        PyErr_Format(PyExc_ValueError, "%s", name);
    Py_XDECREF(all);
    return failure;
}

/* ---- the type ---- */

static int kind_of(const char *dtype)
{
    static const char *const names[] = {"uint8", "uint16", "uint32", "int16", "float32"};
    for (int i = 0; i < 5; i++)
        if (!strcmp(dtype, names[i]))
            return i;
    PyErr_Format(PyExc_ValueError, "no kernel for pixels of '%.40s'", dtype);
    return -1;
}

static int sizes_fit(long long height, long long width, long long rows)
{
    if (height < 1 || width < 1 || height >= MOST_PIXELS || width >= MOST_PIXELS || height * width >= MOST_PIXELS ||
        rows < 0 || rows >= (1LL << 32)) {
        PyErr_Format(PyExc_ValueError, "%lld frames of %lld x %lld pixels", rows, height, width);
        return 0;
    }
    return 1;
}

static int init(Pass *self, PyObject *args, PyObject *named)
{
    static char *names[] = {"dtype", "det_shape", "rows",   "kernel",  "sum", "squares",
                            "level", "max",       "masks",  "labels", "moments", NULL};
    const char *dtype, *kernel = "auto";
    long long height, width, rows;
    PyObject *sum = Py_None, *squares = Py_None, *level = Py_None, *max = Py_None;
    PyObject *masks = NULL, *labels = NULL, *moments = NULL;
    if (self->pass) {
        PyErr_SetString(PyExc_RuntimeError, "a Pass is made once");
        return -1;
    }
    if (!PyArg_ParseTupleAndKeywords(args, named, "s(LL)L|$sOOOOOOO", names, &dtype, &height, &width, &rows, &kernel,
                                     &sum, &squares, &level, &max, &masks, &labels, &moments))
        return -1;
    self->kind = kind_of(dtype);
    const struct nat_ops *ops = self->kind < 0 ? NULL : find_ops(kernel);
    if (!ops || !sizes_fit(height, width, rows))
        return -1;
    nat_pass *pass = nat_pass_new(ops, self->kind, height, width, rows);
    if (!pass) {
        PyErr_NoMemory();
        return -1;
    }
    self->pass = pass;
    if (want_images(self, sum, squares, max) || want_level(self, level) ||
        want_each(self, masks, want_masks, "masks") || want_each(self, labels, want_labels, "labels") ||
        want_each(self, moments, want_moments, "moments") || failed(nat_pass_ready(pass), "pass")) {
        self->pass = NULL;
        nat_pass_free(pass);
        return -1;
    }
    return 0;
}

static void dealloc(Pass *self)
{
    nat_pass_free(self->pass);
    for (size_t i = 0; i < self->buffer_count; i++)
        PyBuffer_Release(&self->buffers[i]);
    PyMem_Free(self->buffers);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

/* The pass, or NULL with an exception set where the constructor has failed. */
static nat_pass *made(Pass *self)
{
    if (!self->pass)
        PyErr_SetString(PyExc_ValueError, "this Pass was never made");
    return self->pass;
}

/* Frames in a buffer of whole frames, or -1 with an exception set. */
static int64_t frames_in(const nat_pass *pass, const Py_buffer *buffer)
{
    if ((size_t)buffer->len % pass->frame_bytes)
        PyErr_Format(PyExc_ValueError, "frames: %zd bytes are no multiple of %zu", buffer->len, pass->frame_bytes);
    else
        return buffer->len / (int64_t)pass->frame_bytes;
    return -1;
}

static PyObject *add(Pass *self, PyObject *args, PyObject *named)
{
    static char *names[] = {"frames", "row", "threads", NULL};
    PyObject *frames;
    long long row;
    int threads = 1, error = NAT_OK;
    Py_buffer buffer;
    if (!PyArg_ParseTupleAndKeywords(args, named, "OL|i", names, &frames, &row, &threads) || !made(self) ||
        get(frames, &buffer, 0, "frames"))
        return NULL;
    int64_t n = frames_in(self->pass, &buffer);
    if (n >= 0) {
        Py_BEGIN_ALLOW_THREADS
        error = nat_pass_run(self->pass, buffer.buf, n, row, threads);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&buffer);
    if (error == NAT_NO_MEMORY)
        return PyErr_NoMemory();
    if (error)
        return PyErr_Format(PyExc_ValueError, "%lld frames from row %lld do not fit %lld rows, or %d threads",
                            (long long)n, row, (long long)self->pass->rows, threads);
    return n < 0 ? NULL : Py_NewRef(Py_None);
}

static PyObject *flush(Pass *self, PyObject *unused)
{
    (void)unused;
    if (!made(self))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    nat_pass_flush(self->pass);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *quality(Pass *self, PyObject *unused)
{
    (void)unused;
    struct nat_quality q;
    if (!made(self))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    q = nat_pass_quality(self->pass);
    Py_END_ALLOW_THREADS
    return Py_BuildValue("{sKsKsKsK}", "pixels", q.pixels, "not_finite", q.not_finite, "saturated", q.saturated,
                         "empty_frames", q.empty_frames);
}

static PyObject *get_kernel(Pass *self, void *unused)
{
    (void)unused;
    return made(self) ? PyUnicode_FromString(self->pass->ops->name) : NULL;
}

static PyObject *get_group(Pass *self, void *unused)
{
    (void)unused;
    return made(self) ? PyLong_FromLongLong(nat_group(self->pass)) : NULL;
}

static PyObject *get_masks_only(Pass *self, void *unused)
{
    (void)unused;
    return made(self) ? PyBool_FromLong(self->pass->masks_only) : NULL;
}

static PyObject *get_mask_bits(Pass *self, void *unused)
{
    (void)unused;
    const uint8_t *const *bits;
    if (!made(self))
        return NULL;
    const int n = nat_pass_masks(self->pass, &bits);
    PyObject *all = PyTuple_New(n);
    for (int i = 0; all && i < n; i++) {
        PyObject *one = PyBytes_FromStringAndSize((const char *)bits[i], (Py_ssize_t)(self->pass->pixels + 7) / 8);
        if (one)
            PyTuple_SET_ITEM(all, i, one);
        else
            Py_CLEAR(all);
    }
    return all;
}

static PyMethodDef pass_methods[] = {
    {"add", (PyCFunction)(void (*)(void))add, METH_VARARGS | METH_KEYWORDS,
     "add(frames, row, threads=1)\n\nAdd frames in C order; the first one is row `row`.  Calls wait for one another."},
    {"flush", (PyCFunction)(void (*)(void))flush, METH_NOARGS,
     "flush()\n\nBring sum, squares and max up to date; frames can be added afterwards."},
    {"quality", (PyCFunction)(void (*)(void))quality, METH_NOARGS,
     "quality()\n\nCounts of pixels, values not finite, saturated pixels and empty frames so far."},
    {0}};

static PyGetSetDef pass_attributes[] = {
    {"kernel", (getter)get_kernel, NULL, "Instruction set in use.", NULL},
    {"group", (getter)get_group, NULL, "Frames whose floats are added together first.", NULL},
    {"masks_only", (getter)get_masks_only, NULL, "Whether only binary masks over unsigned pixels are wanted.", NULL},
    {"mask_bits", (getter)get_mask_bits, NULL, "Bits of those masks, the total first; none if more is wanted.", NULL},
    {0}};

static PyTypeObject pass_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "mpi_kernels._native.Pass",
    .tp_doc = "All terms of a recipe in one visit of each frame.",
    .tp_basicsize = sizeof(Pass),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)init,
    .tp_dealloc = (destructor)dealloc,
    .tp_methods = pass_methods,
    .tp_getset = pass_attributes,
};

static PyMethodDef functions[] = {
    {"kernels", kernels, METH_NOARGS, "kernels()\n\nInstruction sets that this machine has, best first."}, {0}};

int nat_register_kernels(PyObject *module)
{
    if (PyType_Ready(&pass_type) || PyModule_AddFunctions(module, functions))
        return -1;
    return PyModule_AddObjectRef(module, "Pass", (PyObject *)&pass_type);
}
