"""Reading, audit, split, augmentation and loading. Stateless: order and augmentation are functions of their keys."""
