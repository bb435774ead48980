# Runs PROGRAM under mpirun with one failing rank: the whole job must end, quickly, with EXIT_CODE (a regex), and say why:
# each of MESSAGES (regexes) is found in its output, in any order, for mpirun mixes what ranks write as it pleases.
#   cmake -DMPIEXEC=mpirun -DPROGRAM=fail_on_rank -DRANKS=3 "-DARGUMENTS=1;check" -DEXIT_CODE=134 "-DMESSAGES=regex;regex" -P
set(limit 10)
string(TIMESTAMP started "%s")
execute_process(COMMAND ${MPIEXEC} -np ${RANKS} ${PROGRAM} ${ARGUMENTS} TIMEOUT ${limit}
  RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
string(TIMESTAMP ended "%s")
math(EXPR seconds "${ended} - ${started}")
message(STATUS "exit ${result} after ${seconds} s:\n${output}")
if(NOT result MATCHES "^(${EXIT_CODE})$")
  message(FATAL_ERROR "exit code ${result}, expected ${EXIT_CODE}")
endif()
foreach(message IN LISTS MESSAGES)
  if(NOT output MATCHES "${message}")
    message(FATAL_ERROR "no line matches: ${message}")
  endif()
endforeach()
