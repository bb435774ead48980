# Runs PROGRAM under mpirun with one failing rank: the whole job must end, quickly, with EXIT_CODE, and say why.
#   cmake -DMPIEXEC=mpirun -DPROGRAM=fail_on_rank -DRANKS=3 -DFAILING=1 -DHOW=check -DEXIT_CODE=134 -DMESSAGE=regex -P
set(limit 10)
string(TIMESTAMP started "%s")
execute_process(COMMAND ${MPIEXEC} -np ${RANKS} ${PROGRAM} ${FAILING} ${HOW} TIMEOUT ${limit}
  RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
string(TIMESTAMP ended "%s")
math(EXPR seconds "${ended} - ${started}")
message(STATUS "exit ${result} after ${seconds} s:\n${output}")
if(NOT result STREQUAL EXIT_CODE)
  message(FATAL_ERROR "exit code ${result}, expected ${EXIT_CODE}")
endif()
if(MESSAGE AND NOT output MATCHES "${MESSAGE}")
  message(FATAL_ERROR "no line matches: ${MESSAGE}")
endif()
