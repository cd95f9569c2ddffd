#!/usr/bin/env bash
# Start-up script of a spot VM on Google Compute Engine: it runs at every boot, so a VM that is started again after a
# preemption goes on with its run. The repository is on the VM's disk, `bash setup_env.sh` was run in it.
#
#   gcloud compute instances create trainer-0 --provisioning-model=SPOT --instance-termination-action=STOP \
#       --scopes=cloud-platform --metadata-from-file=startup-script=launch/gce_spot_startup.sh \
#       --metadata=REPOSITORY=/opt/pretrain,DATA=gs://bucket/shards,CHECKPOINTS=gs://bucket/Checkpoints …
#
# REPOSITORY and the variables of prod_train.sh are metadata of the instance. Something outside must start a stopped VM
# again, such as a managed instance group of size 1. `journalctl -u pretrain -f` shows the run.
set -euo pipefail

METADATA='http://metadata.google.internal/computeMetadata/v1/instance/attributes/?recursive=true&alt=text'
VARIABLES=(GPUS NNODES NODE_RANK MASTER_ADDR MASTER_PORT MEET_S DATA VAL_DATA CHECKPOINTS PRECISION CONFIG RUN
    MAX_RESTARTS GRACE_S)

# lines of NAME VALUE; what can't be read must not pass for what is not set
attributes="$(curl --silent --show-error --fail --retry 10 --retry-connrefused --header 'Metadata-Flavor: Google' \
    "$METADATA")"
# The value of an attribute; '' where there is none.
attribute() { awk -v name="$1" '$1 == name { print substr($0, length(name) + 2); exit }' <<<"$attributes"; }

repository="$(attribute REPOSITORY)"
if [[ ! -f "$repository/prod_train.sh" ]]; then
    echo "gce_spot_startup error: the metadata REPOSITORY='$repository' is no folder with prod_train.sh." \
        "Set it: gcloud compute instances add-metadata NAME --metadata=REPOSITORY=/opt/pretrain" >&2
    exit 2
fi
environment=()
for name in "${VARIABLES[@]}"; do
    value="$(attribute "$name")"
    if [[ -z "$value" && "$name" = GRACE_S ]]; then value=20; fi # a preempted VM has 30 s
    if [[ -z "$value" && "$name" = MEET_S ]]; then value=1800; fi # the other nodes may have to wait for a VM
    if [[ -n "$value" ]]; then environment+=("--setenv=$name=$value"); fi
done

# A unit of its own: systemd sends it SIGTERM when the VM is taken away, and starts it again after a crash, but not
# where the settings, the data, the checkpoints or the loss are wrong.
owner="$(stat -c %U "$repository")"
exec systemd-run --unit=pretrain --collect --uid="$owner" --working-directory="$repository" \
    --property=KillMode=mixed --property=TimeoutStopSec=28 \
    --property=Restart=on-failure --property=RestartSec=10 --property='RestartPreventExitStatus=2 3 5 6' \
    "${environment[@]}" bash prod_train.sh
