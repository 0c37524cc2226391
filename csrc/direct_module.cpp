// The short way of a call, from Python's side: what tensors are, without torch's headers. Plain CPython functions, as
// pybind11's own way of a call costs as much as what is saved. Tensors are read through the C table that torch offers
// for that (`torch.Tensor.__dlpack_c_exchange_api__`, DLPack 1.3).
#include "direct_module.h"

#include <dlfcn.h>

#include <new>
#include <optional>
#include <stdexcept>
#include <vector>

#include "direct.h"
#include "runtime/result.h"

namespace fs::direct {
namespace {

// --- DLPack 1.x (https://dmlc.github.io/dlpack), as far as it is used: the layout of its structs is its ABI --

struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t dims;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
constexpr int32_t kCpu = 1;
constexpr uint8_t kInt = 0, kUInt = 1, kFloat = 2, kBFloat = 4;

struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* older;
  void* not_used[3];  // allocator, from_py_object, to_py_object: of tensors that own memory
  int (*view)(void* tensor, DLTensor* out);
  void* current_work_stream;
};

// --- What direct_setup() was given ----------------------------------------------------------------------------------

struct Torch {
  int (*view)(void* tensor, DLTensor* out) = nullptr;
  // torch's own THPVariable_Wrap(const at::TensorBase&): a tensor as a Python object.
  PyObject* (*wrap)(const void* tensor) = nullptr;
  PyTypeObject *tensor, *parameter;
  PyObject *is_neg, *requires_grad;
  std::vector<PyObject*> modes;  // called without arguments: any that is true asks for the dispatcher
} torch;

// Truth of what a callable returns; -1 with an error set.
int truth(PyObject* result) {
  if (result == nullptr) return -1;
  const int is = PyObject_IsTrue(result);
  Py_DECREF(result);
  return is;
}

std::optional<View> view_of(PyObject* object) {
  if (Py_TYPE(object) != torch.tensor && Py_TYPE(object) != torch.parameter) return std::nullopt;
  DLTensor t;
  if (torch.view(object, &t) != 0) {
    PyErr_Clear();  // one that has no memory of its own: sparse, of a transform, on another device
    return std::nullopt;
  }
  if (t.device_type != kCpu || t.type_lanes != 1 || t.strides == nullptr) return std::nullopt;
  const auto is = [&](uint8_t code, uint8_t bits) { return t.type_code == code && t.type_bits == bits; };
  const Element type = is(kFloat, 32)    ? Element::f32
                       : is(kBFloat, 16) ? Element::bf16
                       : is(kFloat, 16)  ? Element::f16
                       : is(kInt, 8)     ? Element::s8
                       : is(kUInt, 8)    ? Element::u8
                       : is(kInt, 32)    ? Element::s32
                                         : Element::other;
  return View{static_cast<const uint8_t*>(t.data) + t.byte_offset, type, t.dims, t.shape, t.strides};
}

// One call: its arguments as views, and the family's host. An error in Python's sense is kept in Python's own place.
class Call final : public Host {
 public:
  ~Call() { Py_XDECREF(y_); }

  // No mode in force. False: not this way, or an error is set.
  bool may() const {
    for (PyObject* mode : torch.modes)
      if (truth(PyObject_CallNoArgs(mode)) != 0) return false;
    return true;
  }

  // A plain tensor with nothing to record. Of numbers it must be known that they aren't lazily negated: the memory
  // would hold another sign.
  bool read(PyObject* object, std::optional<View>* out) const {
    *out = view_of(object);
    if (!out->has_value()) return false;
    const Element type = (*out)->type;
    if (type == Element::u8) return true;  // a pack
    if (truth(PyObject_CallOneArg(torch.is_neg, object)) != 0) return false;
    return !grad_ || type == Element::s8 || truth(PyObject_GetAttr(object, torch.requires_grad)) == 0;
  }
  bool read_optional(PyObject* object, std::optional<View>* out) const {
    return object == Py_None || read(object, out);
  }

  bool allocate(const View& x, int64_t n, Element type, void** data) override {
    constexpr int kMostDims = 8;
    if (x.dims > kMostDims) return false;
    int64_t sizes[kMostDims];
    for (int i = 0; i < x.dims; ++i) sizes[i] = i + 1 == x.dims ? n : x.size[i];
    void* const tensor = new_result(sizes, x.dims, type, data);
    if (tensor == nullptr) return false;
    y_ = torch.wrap(tensor);
    free_result(tensor);
    return y_ != nullptr;
  }

  void unlock() override { state_ = PyEval_SaveThread(); }
  void lock() override { PyEval_RestoreThread(state_); }

  // What the function returns: y where the family took the call, else None, or null with an error set.
  PyObject* result(bool taken) {
    if (PyErr_Occurred() != nullptr) return nullptr;
    if (!taken) Py_RETURN_NONE;
    PyObject* y = y_;
    y_ = nullptr;
    return y;
  }

 private:
  PyObject* y_ = nullptr;
  PyThreadState* state_ = nullptr;
  bool grad_ = is_grad_enabled();
};

// A function of `_C`: `count` arguments, exceptions as those of an op.
template <class F>
PyObject* guarded(Py_ssize_t given, Py_ssize_t count, const F& run) {
  if (given != count) {
    PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", count, given);
    return nullptr;
  }
  try {
    Call call;
    return call.result(torch.view != nullptr && call.may() && run(call));
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

const View* pointer(const std::optional<View>& view) { return view.has_value() ? &*view : nullptr; }

// x, weight, weight_scale, bias or None, activation
PyObject* int8_linear_py(PyObject*, PyObject* const* args, Py_ssize_t given) {
  return guarded(given, 5, [&](Call& call) {
    std::optional<View> x, weight, scale, bias;
    return call.read(args[0], &x) && call.read(args[1], &weight) && call.read(args[2], &scale) &&
           call.read_optional(args[3], &bias) &&
           int8_linear(call, *x, *weight, *scale, pointer(bias), PyLong_AsLong(args[4]));
  });
}

// a, b
PyObject* int8_mm_py(PyObject*, PyObject* const* args, Py_ssize_t given) {
  return guarded(given, 2, [&](Call& call) {
    std::optional<View> a, b;
    return call.read(args[0], &a) && call.read(args[1], &b) && int8_mm(call, *a, *b);
  });
}

// x, weight, weight_scale or None, bias or None, n, activation
PyObject* weight_only_linear_py(PyObject*, PyObject* const* args, Py_ssize_t given) {
  return guarded(given, 6, [&](Call& call) {
    std::optional<View> x, weight, scale, bias;
    return call.read(args[0], &x) && call.read(args[1], &weight) && call.read_optional(args[2], &scale) &&
           call.read_optional(args[3], &bias) &&
           weight_only_linear(call, *x, *weight, pointer(scale), pointer(bias), PyLong_AsLong(args[4]),
                              PyLong_AsLong(args[5]));
  });
}

// x, weight, bias or None, n, activation
PyObject* sparse_linear_py(PyObject*, PyObject* const* args, Py_ssize_t given) {
  return guarded(given, 5, [&](Call& call) {
    std::optional<View> x, weight, bias;
    return call.read(args[0], &x) && call.read(args[1], &weight) && call.read_optional(args[2], &bias) &&
           sparse_linear(call, *x, *weight, pointer(bias), PyLong_AsLong(args[3]), PyLong_AsLong(args[4]));
  });
}

// x, weight, weight_scale, bias or None, activation
PyObject* sparse_int8_linear_py(PyObject*, PyObject* const* args, Py_ssize_t given) {
  return guarded(given, 5, [&](Call& call) {
    std::optional<View> x, weight, scale, bias;
    return call.read(args[0], &x) && call.read(args[1], &weight) && call.read(args[2], &scale) &&
           call.read_optional(args[3], &bias) &&
           sparse_int8_linear(call, *x, *weight, *scale, pointer(bias), PyLong_AsLong(args[4]));
  });
}

// exchange api capsule, Tensor, Parameter, is_neg, modes: True if the short way is open.
PyObject* setup(PyObject*, PyObject* args) {
  PyObject *capsule, *tensor, *parameter, *is_neg, *modes;
  if (!PyArg_ParseTuple(args, "OO!O!OO!", &capsule, &PyType_Type, &tensor, &PyType_Type, &parameter, &is_neg,
                        &PyTuple_Type, &modes))
    return nullptr;
  auto* api = static_cast<ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (api == nullptr) return nullptr;
  while (api != nullptr && api->major > 1) api = api->older;
  // No header of torch's is used here and nothing is linked: what is missing closes the short way and no more.
  void* const library = dlopen("libtorch_python.so", RTLD_NOLOAD | RTLD_LAZY);
  void* const wrap = library == nullptr ? nullptr : dlsym(library, "_Z16THPVariable_WrapRKN2at10TensorBaseE");
  torch.requires_grad = PyUnicode_InternFromString("requires_grad");
  if (torch.requires_grad == nullptr) return nullptr;
  if (api == nullptr || api->major != 1 || api->view == nullptr || wrap == nullptr) Py_RETURN_FALSE;
  const auto keep = [](PyObject* object) {
    Py_INCREF(object);  // for as long as the process runs
    return object;
  };
  torch.tensor = reinterpret_cast<PyTypeObject*>(keep(tensor));
  torch.parameter = reinterpret_cast<PyTypeObject*>(keep(parameter));
  torch.is_neg = keep(is_neg);
  torch.modes.clear();
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(modes); ++i) torch.modes.push_back(keep(PyTuple_GET_ITEM(modes, i)));
  torch.wrap = reinterpret_cast<PyObject* (*)(const void*)>(wrap);
  torch.view = api->view;
  Py_RETURN_TRUE;
}

PyMethodDef functions[] = {
    {"direct_setup", setup, METH_VARARGS, "Opens the short way of a call (ops/_call.py); False: torch has no table."},
    {"int8_linear", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&int8_linear_py)), METH_FASTCALL,
     "ops.int8_linear by the short way: y, or None where the op has to be asked."},
    {"int8_mm", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&int8_mm_py)), METH_FASTCALL,
     "The same of int8_mm."},
    {"weight_only_linear", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&weight_only_linear_py)),
     METH_FASTCALL, "The same of weight_only_linear."},
    {"sparse_linear", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&sparse_linear_py)), METH_FASTCALL,
     "The same of sparse_linear."},
    {"sparse_int8_linear", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&sparse_int8_linear_py)),
     METH_FASTCALL, "The same of sparse_int8_linear."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

bool add_to(PyObject* module) { return PyModule_AddFunctions(module, functions) == 0; }

}  // namespace fs::direct
