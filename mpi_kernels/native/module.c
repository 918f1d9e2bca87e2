/* The Python module mpi_kernels._native. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "native.h"

int nat_register_chunks(struct _object *module); /* py_chunks.c */

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "mpi_kernels._native", .m_doc = "Compiled kernels, decoders and readers.", .m_size = -1};

PyMODINIT_FUNC PyInit__native(void)
{
    PyObject *module = PyModule_Create(&definition);
    if (module && (nat_register_kernels(module) || nat_register_codecs(module) || nat_register_feed(module) ||
                   nat_register_chunks(module)))
        Py_CLEAR(module);
    return module;
}
