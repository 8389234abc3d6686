"""Connectors: Esker inside engines, through the extension points that the engines have.

Each module imports its engine when it is imported itself, so import only the one that is needed: ``esker.connectors.vllm``,
``esker.connectors.vllm_tier``, ``esker.connectors.sglang``, ``esker.connectors.lmcache``.
"""
