# cmake -DHEADERS=A;B -DBUILT_WITH=TEXT -DOUT=FILE -P module_identity.cmake: writes a header with a name for all that the
# program and libtrireme_cuda.so must have alike, since objects with virtual functions cross the border between them.
set(all "${BUILT_WITH}")
foreach(header IN LISTS HEADERS)
  file(SHA256 ${header} hash)
  get_filename_component(name ${header} NAME)
  string(APPEND all " ${name}=${hash}")
endforeach()
string(SHA256 identity "${all}")
string(SUBSTRING ${identity} 0 12 identity)
file(WRITE ${OUT} "#define TRIREME_MODULE_IDENTITY \"${identity}\"\n")
