-- Run once by the postgres image, in the database of the example, when its data folder is empty.

CREATE ROLE speedlayer LOGIN PASSWORD 'change-me';

-- speedlayer keeps its checkpoints and dead letters here, and makes the tables itself, as the schema's owner.
-- (`speedlayer init --print-sql` prints what to run instead where its role may own nothing.)
CREATE SCHEMA speedlayer AUTHORIZATION speedlayer;

CREATE TABLE public.orders (
    order_id   bigint PRIMARY KEY,
    customer   text NOT NULL,
    amount     numeric(12, 2) NOT NULL,
    status     text NOT NULL DEFAULT 'NEW',
    ordered_at timestamptz NOT NULL DEFAULT now()
);
GRANT SELECT, INSERT, UPDATE ON public.orders TO speedlayer;
