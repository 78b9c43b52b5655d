"""Everything that is to be known of conserve_sgl on one GPU, within a given time.

`scripts/gpu/run.sh` is the command; `parts` says what there is to measure, in the order of worth,
`plan` what fits, `archive` how results leave the machine, `summary` what came out.
"""
