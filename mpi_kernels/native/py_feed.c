/* What Python sees of the reader: mpi_kernels/feed.py says what the arguments mean. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>
#include <sys/mman.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "feed.h"
#include "py_kernels.h"

/* The caller looks this often whether a signal came; Ctrl-C must not wait for a read of a whole file. */
enum { LOOK_MS = 50 };
/* No detector writes a record that a compressor made this much longer: 12 and 4 bytes of header for each block of at
 * least 128 elements, and LZ4's worst case.  Source: LZ4_compressBound in lz4.h. */
enum { MOST_OVERHEAD = 4096 };
#define MOST_BYTES ((int64_t)1 << 60)

typedef struct {
    PyObject_HEAD
    struct nat_feed feed;
    Py_buffer offsets, file_of, sizes;
} Reader;

static int refuse(const char *what)
{
    PyErr_Format(PyExc_ValueError, "%s of the layout can't be", what);
    return -1;
}

/* A contiguous array of n items at least, or None. */
static int array(PyObject *object, Py_buffer *view, Py_ssize_t item, int64_t n, const char *what)
{
    if (object == Py_None)
        return 0;
    if (PyObject_GetBuffer(object, view, PyBUF_C_CONTIGUOUS))
        return -1;
    return view->itemsize == item && view->len / item >= n ? 0 : refuse(what);
}

/* Check everything that later arithmetic relies on. */
static int check(const struct feed_layout *l)
{
    int64_t product, record, end;
    if (l->frames < 0 || l->frame_bytes < 1 || l->record_frames < 1 || l->first < 0 || l->lead < 0 || l->tail < 0)
        return refuse("a number");
    if (l->pixel != 1 && l->pixel != 2 && l->pixel != 4 && l->pixel != 8)
        return refuse("the pixel");
    if (l->frame_bytes % (int64_t)l->pixel || __builtin_mul_overflow(l->record_frames, l->frame_bytes, &product) ||
        product != l->payload)
        return refuse("the payload");
    if (l->magic_bytes > l->lead + l->payload || (l->codec != NAT_PLAIN) != (l->sizes != NULL))
        return refuse("the codec");
    if (l->codec != NAT_PLAIN && (!l->offsets || l->lead || l->tail || l->magic_bytes || l->numbered || l->element < 1))
        return refuse("a compressed record");
    int64_t records = (l->frames + l->record_frames - 1) / l->record_frames;
    if (l->payload > MOST_BYTES || l->lead > MOST_BYTES || l->tail > MOST_BYTES || l->first > MOST_BYTES)
        return refuse("a record");
    record = l->lead + l->payload + l->tail;
    if (!l->offsets && (__builtin_mul_overflow(records, record, &end) || end > MOST_BYTES))
        return refuse("the size");
    for (int64_t i = 0; i < records; i++) {
        if (l->offsets && l->offsets[i] > MOST_BYTES)
            return refuse("an offset");
        if (l->file_of && (l->file_of[i] < 0 || l->file_of[i] >= l->files))
            return refuse("a file");
        if (l->sizes && l->sizes[i] > 2 * l->payload + MOST_OVERHEAD)
            return refuse("a stored size");
    }
    return 0;
}

static struct feed_files *open_table(PyObject *paths)
{
    Py_ssize_t n = PyTuple_GET_SIZE(paths);
    const char **names = PyMem_Calloc((size_t)n + 1, sizeof *names);
    if (!names)
        return (struct feed_files *)PyErr_NoMemory();
    struct feed_files *files = NULL;
    Py_ssize_t i = 0;
    while (i < n && PyBytes_AsStringAndSize(PyTuple_GET_ITEM(paths, i), (char **)&names[i], NULL) == 0)
        i++;
    if (i == n && n > 0 && !(files = feed_files_new((int)n, names)))
        PyErr_NoMemory();
    if (n == 0)
        refuse("the files");
    PyMem_Free(names);
    return files;
}

static int Reader_init(Reader *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"files",   "frames", "frame_bytes", "record_frames", "payload",  "first",     "lead",
                            "tail",    "offsets", "file_of",    "sizes",         "codec",    "element",   "pixel",
                            "swap",    "kind",   "unsigned", "flag",      "magic",         "number",   "reading",   "threads",
                            NULL};
    struct nat_feed *feed = &self->feed;
    struct feed_layout *l = &feed->layout;
    PyObject *paths, *offsets, *file_of, *sizes, *flag, *number;
    Py_buffer magic;
    int codec, swap, is_unsigned, reading, threads;
    Py_ssize_t element, pixel;
    if (feed->files) {
        PyErr_SetString(PyExc_RuntimeError, "a reader is made once");
        return -1;
    }
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "$O!LLLLLLLOOOinnpipOy*Oii", names, &PyTuple_Type, &paths, &l->frames,
                                     &l->frame_bytes, &l->record_frames, &l->payload, &l->first, &l->lead, &l->tail,
                                     &offsets, &file_of, &sizes, &codec, &element, &pixel, &swap, &l->kind, &is_unsigned, &flag,
                                     &magic, &number, &reading, &threads))
        return -1;
    l->magic_bytes = magic.len;
    if (magic.len <= FEED_MAGIC)
        memcpy(l->magic, magic.buf, (size_t)magic.len);
    PyBuffer_Release(&magic);
    l->files = PyTuple_GET_SIZE(paths);
    l->codec = (enum nat_codec)codec;
    l->element = (size_t)element;
    l->pixel = (size_t)pixel;
    l->swap = swap && pixel > 1;
    l->flagged = flag != Py_None;
    l->flag = l->flagged ? PyLong_AsUnsignedLongLongMask(flag) : 0;
    l->numbered = number != Py_None;
    l->number = l->numbered ? PyLong_AsLongLong(number) : 0;
    if (PyErr_Occurred())
        return -1;
    l->countable = is_unsigned && !l->swap && l->element == l->pixel;
    if (l->magic_bytes > FEED_MAGIC || l->files > INT32_MAX / 4 || threads < 1 || threads > 1024 || reading < FEED_MMAP ||
        reading > FEED_DIRECT || codec < NAT_PLAIN || codec > NAT_BITSHUFFLE || l->record_frames < 1)
        return refuse("a number");
    feed->reading = (enum feed_reading)reading;
    feed->threads = threads;
    int64_t records = l->frames > 0 ? (l->frames - 1) / l->record_frames + 1 : 0;
    if (array(offsets, &self->offsets, sizeof(int64_t), records, "the offsets") ||
        array(file_of, &self->file_of, sizeof(int32_t), records, "the files") ||
        array(sizes, &self->sizes, sizeof(int64_t), records, "the stored sizes"))
        return -1;
    l->offsets = self->offsets.buf;
    l->file_of = self->file_of.buf;
    l->sizes = self->sizes.buf;
    if (check(l))
        return -1;
    feed->files = open_table(paths);
    return feed->files ? 0 : -1;
}

static PyObject *Reader_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    (void)args;
    (void)kwargs;
    Reader *self = (Reader *)type->tp_alloc(type, 0);
    if (self)
        pthread_mutex_init(&self->feed.busy, NULL);
    return (PyObject *)self;
}

static void Reader_dealloc(Reader *self)
{
    if (self->feed.files)
        feed_files_free(self->feed.files);
    PyBuffer_Release(&self->offsets);
    PyBuffer_Release(&self->file_of);
    PyBuffer_Release(&self->sizes);
    pthread_mutex_destroy(&self->feed.busy);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

/* Wait for the threads; an exception of a signal's handler or of `progress` stops them. */
static void wait_for(struct feed_call *call, PyObject *progress)
{
    int ended = 0;
    for (int turn = 0; !ended; turn++) {
        Py_BEGIN_ALLOW_THREADS
        ended = feed_wait(call, LOOK_MS);
        Py_END_ALLOW_THREADS
        if (ended || PyErr_Occurred())
            continue;
        int wrong = PyErr_CheckSignals();
        if (!wrong && progress != Py_None && turn % 2) {
            PyObject *said = PyObject_CallFunction(progress, "L", (long long)atomic_load(&call->done));
            wrong = said ? 0 : -1;
            Py_XDECREF(said);
        }
        if (wrong)
            feed_stop(call);
    }
}

/* Run a call: None, or (status, frame, errno, detail, told) of the first frame that is not there. */
static PyObject *perform(struct nat_feed *feed, struct feed_call *call, PyObject *progress)
{
    if (!feed->files) {
        PyErr_SetString(PyExc_ValueError, "the reader is closed");
        return NULL;
    }
    if (call->start < 0 || call->start > call->stop || call->stop > feed->layout.frames) {
        PyErr_Format(PyExc_ValueError, "frames %lld:%lld are not within 0:%lld", (long long)call->start,
                     (long long)call->stop, (long long)feed->layout.frames);
        return NULL;
    }
    if (pthread_mutex_trylock(&feed->busy)) {
        PyErr_SetString(PyExc_RuntimeError, "the reader is at work for another call");
        return NULL;
    }
    call->feed = feed;
    if (call->start < call->stop) {
        Py_BEGIN_ALLOW_THREADS
        feed_begin(call);
        Py_END_ALLOW_THREADS
        wait_for(call, progress);
        Py_BEGIN_ALLOW_THREADS
        feed_end(call);
        Py_END_ALLOW_THREADS
    }
    pthread_mutex_unlock(&feed->busy);
    if (PyErr_Occurred())
        return NULL;
    struct feed_failure *f = &call->failure;
    if (f->status == NAT_NO_MEMORY)
        return PyErr_NoMemory();
    if (f->status == 0)
        Py_RETURN_NONE;
    return Py_BuildValue("iLiLy", f->status, (long long)f->frame, f->error, (long long)f->detail, f->told);
}

static PyObject *Reader_add(Reader *self, PyObject *args)
{
    PyObject *pass, *progress = Py_None;
    struct feed_call call = {0};
    if (!PyArg_ParseTuple(args, "OLLL|O", &pass, &call.start, &call.stop, &call.row, &progress))
        return NULL;
    call.pass = nat_pass_of(pass);
    if (!call.pass) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_ValueError, "this Pass was never made");
        return NULL;
    }
    if (nat_pass_kind(call.pass) != self->feed.layout.kind ||
        (int64_t)nat_frame_bytes(call.pass) != self->feed.layout.frame_bytes) {
        PyErr_Format(PyExc_ValueError, "the pass takes other pixels, or frames of %zu bytes instead of %lld",
                     nat_frame_bytes(call.pass), (long long)self->feed.layout.frame_bytes);
        return NULL;
    }
    if (call.row < 0 || call.stop - call.start > nat_pass_rows(call.pass) - call.row) {
        PyErr_Format(PyExc_ValueError, "%lld frames from row %lld do not fit the %lld rows of the pass",
                     (long long)(call.stop - call.start), (long long)call.row, (long long)nat_pass_rows(call.pass));
        return NULL;
    }
    return perform(&self->feed, &call, progress);
}

static PyObject *Reader_frames(Reader *self, PyObject *args)
{
    Py_buffer out;
    struct feed_call call = {0};
    if (!PyArg_ParseTuple(args, "LLw*", &call.start, &call.stop, &out))
        return NULL;
    call.out = out.buf;
    PyObject *found = NULL;
    if (call.stop < call.start || (call.stop - call.start) * self->feed.layout.frame_bytes != out.len)
        PyErr_SetString(PyExc_ValueError, "the buffer does not have the size of the frames");
    else
        found = perform(&self->feed, &call, Py_None);
    PyBuffer_Release(&out);
    return found;
}

static PyObject *Reader_close(Reader *self, PyObject *unused)
{
    (void)unused;
    if (pthread_mutex_trylock(&self->feed.busy)) {
        PyErr_SetString(PyExc_RuntimeError, "the reader is at work for another call");
        return NULL;
    }
    if (self->feed.files)
        feed_files_free(self->feed.files);
    self->feed.files = NULL;
    pthread_mutex_unlock(&self->feed.busy);
    Py_RETURN_NONE;
}

static PyObject *Reader_refused(Reader *self, void *unused)
{
    (void)unused;
    return PyLong_FromLong(self->feed.files ? feed_files_refused(self->feed.files) : 0);
}

/* f_type of statfs(2) */
static PyObject *file_system(PyObject *module, PyObject *args)
{
    (void)module;
    int fd;
    struct statfs facts;
    if (!PyArg_ParseTuple(args, "i", &fd))
        return NULL;
    if (fstatfs(fd, &facts))
        return PyErr_SetFromErrno(PyExc_OSError);
    return PyLong_FromUnsignedLong((unsigned long)facts.f_type & 0xffffffffUL);
}

/* mincore(2) of n pages spread over bytes lo:hi of a file. */
static PyObject *pages_in_cache(PyObject *module, PyObject *args)
{
    (void)module;
    int fd;
    long long lo, hi;
    int n, found = 0, asked = 0;
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    if (!PyArg_ParseTuple(args, "iLLi", &fd, &lo, &hi, &n))
        return NULL;
    for (int i = 0; i < n && lo < hi; i++) {
        long long at = (lo + (hi - 1 - lo) / (n > 1 ? n - 1 : 1) * i) / (long long)page * (long long)page;
        unsigned char resident = 0;
        void *map = mmap(NULL, page, PROT_READ, MAP_SHARED, fd, at);
        if (map == MAP_FAILED)
            return PyErr_SetFromErrno(PyExc_OSError);
        int status = mincore(map, page, &resident);
        munmap(map, page);
        asked += status == 0;
        found += status == 0 && resident & 1;
    }
    return Py_BuildValue("ii", found, asked);
}

static PyMethodDef reader_methods[] = {
    {"add", (PyCFunction)Reader_add, METH_VARARGS, "add(pass, start, stop, row, progress=None)"},
    {"frames", (PyCFunction)Reader_frames, METH_VARARGS, "frames(start, stop, out)"},
    {"close", (PyCFunction)Reader_close, METH_NOARGS, "Close the files."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef reader_facts[] = {
    {"refused", (getter)Reader_refused, NULL, "Files that refused O_DIRECT.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyTypeObject reader_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "mpi_kernels._native.Reader",
    .tp_doc = "Threads that read the frames of a layout.",
    .tp_basicsize = sizeof(Reader),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = Reader_new,
    .tp_init = (initproc)Reader_init,
    .tp_dealloc = (destructor)Reader_dealloc,
    .tp_methods = reader_methods,
    .tp_getset = reader_facts,
};

static PyMethodDef functions[] = {
    {"file_system", file_system, METH_VARARGS, "file_system(fd): type of the file system that holds a file."},
    {"pages_in_cache", pages_in_cache, METH_VARARGS, "pages_in_cache(fd, lo, hi, n): (resident, asked) of n pages."},
    {NULL, NULL, 0, NULL},
};

int nat_register_feed(PyObject *module)
{
    if (PyType_Ready(&reader_type) || PyModule_AddFunctions(module, functions))
        return -1;
    return PyModule_AddObjectRef(module, "Reader", (PyObject *)&reader_type);
}
