"""Tasks that are made on the fly: their generators. `hrm_lm.data.named_tasks` makes data sets of them."""
