#!/bin/bash
# Becomes the job script once the service has recorded who we are:  recorded.sh SCRIPT RUN_FOLDER < pipe
#
# The service starts this, writes our identity to local.json in the run folder, and only then sends the identity here.
# If it dies before, the pipe closes and no job has run; if it dies later, the record finds the job.
set -euo pipefail

read -r EMFLOW_SCHEDULER_ID || exit 0
export EMFLOW_SCHEDULER_ID
cd -- "$2"
exec bash -- "$1" "$2" </dev/null
