"""From a stage to a checkpoint: one engine a framework, all behind `cpt_rft.engines.base.Engine`."""
