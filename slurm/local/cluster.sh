#!/usr/bin/env bash
# A SLURM of two virtual nodes on this machine, for tests. Nothing outside DIR is touched: own configuration, state,
# ports and logs; it is stopped by the process ids it wrote. Needs slurmctld and slurmd (Debian: slurm-wlm) and root.
#
#   slurm/local/cluster.sh start DIR [PORT]   then: export SLURM_CONF=DIR/slurm.conf
#   slurm/local/cluster.sh kill-node DIR N    as if the node lost power: its daemon is killed
#   slurm/local/cluster.sh stop DIR
set -euo pipefail

what=$1
dir=$(mkdir -p -- "$2" && cd -- "$2" && pwd)
export SLURM_CONF=$dir/slurm.conf

write_config() {
    local port=$1 host cpus
    host=$(hostname -s)
    cpus=$(nproc)
    cat > "$SLURM_CONF" << EOF
ClusterName=distunlearn$port
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
SlurmctldPort=$port
SlurmdPort=$((port + 1))
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool.%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$dir/jobs.txt
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=20
ReturnToService=2
MinJobAge=300
JobRequeue=1
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=$cpus RealMemory=1000 State=UNKNOWN
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 3)) CPUs=$cpus RealMemory=1000 State=UNKNOWN
PartitionName=low Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=high Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
EOF
}

start() {
    mkdir -p "$dir/state" "$dir/spool.n1" "$dir/spool.n2"
    write_config "${1:-27817}"
    slurmctld -c -f "$SLURM_CONF"
    slurmd -N n1 -f "$SLURM_CONF"
    slurmd -N n2 -f "$SLURM_CONF"
    for _ in $(seq 60); do
        if [ "$(sinfo -h -N -p low -o %T 2> /dev/null | grep -c idle)" -eq 2 ]; then
            return
        fi
        sleep 0.5
    done
    echo "the cluster did not come up within 30 s; see the logs in $dir" >&2
    stop
    exit 1
}

kill_node() {
    kill -9 "$(cat "$dir/slurmd.$1.pid")"
}

stop() {
    scancel -u root 2> /dev/null || true
    for file in "$dir"/slurmd.n1.pid "$dir"/slurmd.n2.pid "$dir"/slurmctld.pid; do
        [ -e "$file" ] && kill "$(cat "$file")" 2> /dev/null || true
    done
}

case $what in
    start) start "${3:-}" ;;
    kill-node) kill_node "$3" ;;
    stop) stop ;;
    *)
        echo "expected start, kill-node or stop, found $what" >&2
        exit 2
        ;;
esac
