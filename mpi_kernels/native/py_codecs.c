/* What Python sees of codecs.c. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "codecs.h"

enum { WORTH_UNLOCKING = 1 << 16, MOST_MASKS = 1 << 16 }; /* bytes decoded; more masks than anybody means */

static const struct {
    const char *name;
    enum nat_codec codec;
} codecs[] = {{"bitshuffle-lz4", NAT_BITSHUFFLE_LZ4}, {"lz4", NAT_LZ4}, {"bitshuffle", NAT_BITSHUFFLE}};

static int find_codec(const char *name, enum nat_codec *codec)
{
    for (size_t i = 0; i < sizeof codecs / sizeof *codecs; i++)
        if (!strcmp(name, codecs[i].name)) {
            *codec = codecs[i].codec;
            return 0;
        }
    PyErr_Format(PyExc_ValueError, "no codec is called %.40s; there are bitshuffle-lz4, lz4 and bitshuffle", name);
    return -1;
}

static const struct nat_bits *find_bits(const char *name)
{
    const struct nat_bits *with = nat_bits(name);
    if (!with)
        PyErr_Format(PyExc_ValueError, "instruction set %.40s is unknown or not on this processor", name);
    return with;
}

static int check_element(Py_ssize_t element, int most)
{
    if ((element == 1 || element == 2 || element == 4 || element == 8) && element <= most)
        return 0;
    PyErr_Format(PyExc_ValueError, "elements of %zd bytes; there are 1, 2, 4%s", element, most == 8 ? " and 8" : "");
    return -1;
}

static void bad_data(Py_ssize_t n, Py_ssize_t out_bytes)
{
    PyErr_Format(PyExc_ValueError, "%zd compressed bytes can't be decoded into %zd bytes", n, out_bytes);
}

PyDoc_STRVAR(decode_doc,
"decode(codec, element, data, out, instructions=None)\n--\n\n"
"Decode one record of compressed data.\n\n"
"Parameters\n----------\n"
"codec : {'bitshuffle-lz4', 'lz4', 'bitshuffle'}\n"
"    HDF5 filter 32008 with LZ4, filter 32004, or filter 32008 without LZ4 in blocks of the default size.\n"
"element : int\n    Bytes of one element: 1, 2, 4 or 8.\n"
"data : contiguous buffer\n    What the file holds.\n"
"out : contiguous writable buffer\n    Filled, in the byte order of the file; undefined after an error.\n"
"instructions : str, optional\n    An instruction set of `codec_instruction_sets()`; else the fastest.\n\n"
"Raises\n------\n"
"ValueError\n    The data are damaged, or are not exactly as many as `out` has room for.");

static PyObject *decode(PyObject *module, PyObject *args, PyObject *names)
{
    static char *keywords[] = {"codec", "element", "data", "out", "instructions", NULL};
    const char *name, *set_name = NULL;
    Py_ssize_t element;
    Py_buffer data, out;
    enum nat_codec codec;
    const struct nat_bits *with;
    uint8_t *scratch = NULL;
    int rc = NAT_NO_MEMORY;
    (void)module;

    if (!PyArg_ParseTupleAndKeywords(args, names, "sny*w*|z:decode", keywords, &name, &element, &data, &out, &set_name))
        return NULL;
    if (find_codec(name, &codec) || check_element(element, 8) || !(with = find_bits(set_name)))
        goto done;
    scratch = PyMem_RawMalloc(nat_scratch_bytes(codec, (size_t)element, (size_t)out.len));
    if (!scratch) {
        PyErr_NoMemory();
        goto done;
    }
    PyThreadState *state = out.len >= WORTH_UNLOCKING ? PyEval_SaveThread() : NULL;
    rc = nat_decode_with(with, codec, (size_t)element, data.buf, (size_t)data.len, out.buf, (size_t)out.len, scratch);
    if (state)
        PyEval_RestoreThread(state);
    if (rc)
        bad_data(data.len, out.len);
done:
    PyMem_RawFree(scratch);
    PyBuffer_Release(&data);
    PyBuffer_Release(&out);
    if (rc)
        return NULL;
    Py_RETURN_NONE;
}

/* The masks of a sequence as k buffers of at least `bytes` bytes; `*got` of them are to be released, even on error. */
static int get_masks(PyObject *fast, Py_ssize_t bytes, Py_buffer *views, const uint8_t **masks, Py_ssize_t *got)
{
    for (Py_ssize_t m = 0; m < PySequence_Fast_GET_SIZE(fast); m++) {
        if (PyObject_GetBuffer(PySequence_Fast_GET_ITEM(fast, m), &views[m], PyBUF_SIMPLE))
            return -1;
        *got = m + 1;
        if (views[m].len < bytes) {
            PyErr_Format(PyExc_ValueError, "mask %zd has %zd bytes, but the pixels need %zd", m, views[m].len, bytes);
            return -1;
        }
        masks[m] = views[m].buf;
    }
    return 0;
}

static PyObject *sums_as_list(const uint64_t *sums, Py_ssize_t k, uint64_t full)
{
    PyObject *list = PyList_New(k);
    for (Py_ssize_t m = 0; list && m < k; m++) {
        PyObject *number = PyLong_FromUnsignedLongLong(sums[m]);
        if (!number)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, m, number);
    }
    return list ? Py_BuildValue("(NK)", list, (unsigned long long)full) : NULL;
}

/* Room for k masks and their sums, and for the decoder. */
struct room {
    Py_buffer *views;
    const uint8_t **masks;
    uint64_t *sums;
    uint8_t *scratch;
    Py_ssize_t got;
};

static int get_room(struct room *room, Py_ssize_t k, Py_ssize_t element, Py_ssize_t out_bytes)
{
    room->views = PyMem_RawCalloc((size_t)k, sizeof *room->views);
    room->masks = PyMem_RawCalloc((size_t)k, sizeof *room->masks);
    room->sums = PyMem_RawCalloc((size_t)k, sizeof *room->sums);
    room->scratch = PyMem_RawMalloc(nat_scratch_bytes(NAT_BITSHUFFLE_LZ4, (size_t)element, (size_t)out_bytes));
    if (room->views && room->masks && room->sums && room->scratch)
        return 0;
    PyErr_NoMemory();
    return -1;
}

static void free_room(struct room *room)
{
    while (room->got)
        PyBuffer_Release(&room->views[--room->got]);
    PyMem_RawFree(room->views);
    PyMem_RawFree(room->masks);
    PyMem_RawFree(room->sums);
    PyMem_RawFree(room->scratch);
}

static PyObject *sum_masks(Py_ssize_t element, const Py_buffer *data, Py_ssize_t out_bytes, PyObject *fast,
                           const struct nat_bits *with)
{
    const Py_ssize_t k = PySequence_Fast_GET_SIZE(fast), pixels = out_bytes / element;
    struct room room = {0};
    uint64_t full = 0;
    PyObject *answer = NULL;
    if (get_room(&room, k, element, out_bytes) == 0 &&
        get_masks(fast, pixels / 8 + (pixels % 8 != 0), room.views, room.masks, &room.got) == 0) {
        PyThreadState *state = out_bytes >= WORTH_UNLOCKING ? PyEval_SaveThread() : NULL;
        int rc = nat_decode_masks_with(with, (size_t)element, data->buf, (size_t)data->len, (size_t)out_bytes, 1,
                                       room.masks, (int)k, room.sums, &full, room.scratch);
        if (state)
            PyEval_RestoreThread(state);
        if (rc == 0)
            answer = sums_as_list(room.sums, k, full);
        else
            bad_data(data->len, out_bytes);
    }
    free_room(&room);
    return answer;
}

PyDoc_STRVAR(decode_masks_doc,
"decode_masks(element, data, out_bytes, masks, instructions=None)\n--\n\n"
"Sums of a bitshuffle-LZ4 record of unsigned little-endian pixels over binary masks, without making pixels.\n\n"
"Parameters\n----------\n"
"element : int\n    Bytes of one pixel: 1, 2 or 4.\n"
"data : contiguous buffer\n    What the file holds.\n"
"out_bytes : int\n    Size of the decoded record.\n"
"masks : sequence of contiguous buffers\n    Pixel i is bit i % 8 of byte i // 8.\n"
"instructions : str, optional\n    An instruction set of `codec_instruction_sets()`; else the fastest.\n\n"
"Returns\n-------\n"
"(list of int, int)\n    The exact sum over each mask, and the number of pixels that have all bits set.\n\n"
"Raises\n------\n"
"ValueError\n    The data are damaged or of another size, or a mask is too short.");

static PyObject *decode_masks(PyObject *module, PyObject *args, PyObject *names)
{
    static char *keywords[] = {"element", "data", "out_bytes", "masks", "instructions", NULL};
    const char *set_name = NULL;
    Py_ssize_t element, out_bytes;
    Py_buffer data;
    PyObject *masks, *fast = NULL, *answer = NULL;
    const struct nat_bits *with;
    (void)module;

    if (!PyArg_ParseTupleAndKeywords(args, names, "ny*nO|z:decode_masks", keywords, &element, &data, &out_bytes, &masks,
                                     &set_name))
        return NULL;
    /* the sequence becomes a tuple of our own: nobody can shorten it meanwhile */
    if (check_element(element, 4) || !(with = find_bits(set_name)) || !(fast = PySequence_Tuple(masks)))
        goto done;
    if (out_bytes < 0 || PyTuple_GET_SIZE(fast) > MOST_MASKS)
        PyErr_Format(PyExc_ValueError, "%zd bytes and %zd masks", out_bytes, PyTuple_GET_SIZE(fast));
    else
        answer = sum_masks(element, &data, out_bytes, fast, with);
done:
    Py_XDECREF(fast);
    PyBuffer_Release(&data);
    return answer;
}

PyDoc_STRVAR(sets_doc, "codec_instruction_sets()\n--\n\n"
                       "Names of the instruction sets that decoders have for this processor, fastest first.");

static PyObject *codec_instruction_sets(PyObject *module, PyObject *args)
{
    (void)module, (void)args;
    PyObject *list = PyList_New(0);
    for (const char *const *name = nat_bits_names; list && *name; name++) {
        if (!nat_bits(*name))
            continue;
        PyObject *text = PyUnicode_FromString(*name);
        if (!text || PyList_Append(list, text))
            Py_CLEAR(list);
        Py_XDECREF(text);
    }
    return list;
}

static PyMethodDef methods[] = {
    {"decode", (PyCFunction)(void (*)(void))decode, METH_VARARGS | METH_KEYWORDS, decode_doc},
    {"decode_masks", (PyCFunction)(void (*)(void))decode_masks, METH_VARARGS | METH_KEYWORDS, decode_masks_doc},
    {"codec_instruction_sets", codec_instruction_sets, METH_NOARGS, sets_doc},
    {NULL, NULL, 0, NULL}};

int nat_register_codecs(PyObject *module)
{
    return PyModule_AddFunctions(module, methods);
}
