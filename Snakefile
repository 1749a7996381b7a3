# The engine's view of a run: one rule per node of the plan. `adam_nb run PRESET` writes the plan and calls this file;
# by hand: snakemake --cores 2 --config preset=demo   (with --executor slurm or kubernetes for a cluster)
import sys
from adam_nb.pipeline import read_plan, write_plan

plan_path = config["plan"] if "plan" in config else write_plan(config.get("preset", "demo"), config.get("overrides", []), config.get("name"))[0]
nodes = read_plan(plan_path)

rule all:
    input: nodes[-1].output

for node in nodes:
    rule:
        name: node.name.replace(".", "_").replace("-", "_")
        # The parameter file changes only when the node's values or the code that it uses change.
        input: node.inputs + [node.params]
        # The final artefact alone: the engine deletes declared outputs of a failed node, and checkpoints must stay.
        output: node.output
        log: notebook=node.executed
        # A node takes the threads that its parameters name, else the whole machine; two that take all would fight for it.
        threads: node.cores or workflow.cores
        # `adam_nb run` allows as many at once as this machine has memory for.
        resources: at_once=1
        # The interpreter is no parameter: called by another name it must not rerun anything.
        params: name=node.name, plan=str(plan_path)
        shell: "{sys.executable:q} -m adam_nb.pipeline node {params.plan:q} {params.name:q}"
