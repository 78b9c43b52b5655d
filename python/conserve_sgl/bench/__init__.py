"""Measures co-serving, in floors: `load` below `report` below `systems`; on them stand single
measurements (`micro`), the demo, `conserve bench` (`command`) and all of it on one GPU (`gpu`).

Nothing here imports torch or SGLang as it is loaded; servers and jobs are other processes.
"""
