    fn say(node: &mut Node, from: usize, message: Message) -> Reply {
        let (from, to) = (ADDRESSES[from].to_owned(), node.own().to_owned());
        node.receive(Envelope { from, to, version: None, incarnation: 0, life: 0, message })
    }

    fn v(number: u64, coordinator: u64) -> Version {
        Version { epoch: 0, number, coordinator }
    }

    #[test]
    fn t1_locks() {
        let it = store_of_four(2);
        let mut table = it.there(0).with(|node| {
            let mut table = Table::clone(&node.table().expect("a table"));
            table.base = table.version;
            assert!(matches!(say(node, 1, Message::Lock(v(2, 7))), Reply::Locked(_)));
            assert!(matches!(say(node, 1, Message::Lock(v(3, 8))), Reply::Busy), "busy");
            assert!(matches!(say(node, 1, Message::Lock(v(2, 7))), Reply::Locked(_)), "repeated");
            assert!(matches!(say(node, 1, Message::Lock(v(3, 7))), Reply::Locked(_)), "own");
            assert!(matches!(say(node, 1, Message::Lock(v(2, 7))), Reply::Outdated(_)), "outdated");
            table.version = v(2, 8);
            assert!(!node.adopt(Arc::new(table.clone())), "adopt below promise");
            table.version = v(4, 8);
            assert!(!node.adopt_own(Arc::new(table.clone())), "own promise");
            assert!(matches!(say(node, 1, Message::Survey(v(9, 9), vec![])), Reply::Refused), "survey");
            say(node, 1, Message::Release(v(2, 7)));
            assert!(matches!(say(node, 1, Message::Lock(v(4, 8))), Reply::Busy), "release of another");
            say(node, 1, Message::Release(v(3, 7)));
            assert!(matches!(say(node, 1, Message::Lock(v(4, 8))), Reply::Locked(_)), "released");
            table
        });
        it.pass(11_000);
        it.there(0).with(|node| {
            assert!(!node.adopt_own(Arc::new(table.clone())), "own lease");
            table.version = v(3, 8);
            assert!(node.adopt(Arc::new(table.clone())), "lease over");
        });
    }

    #[test]
    fn t1b_adopt() {
        let it = play(2, "pass 0");
        it.there(2).with(|node| {
            let mut table = Table::clone(&node.table().expect("a table"));
            let write = node.write(HASHES[0], Record::new(b"k0", "1"), &node::Context::default());
            // its own coordinator's older table, under a lock for a newer one
            (table.base, table.version) = (table.version, v(2, 7));
            say(node, 1, Message::Lock(v(3, 7)));
            assert!(node.adopt(Arc::new(table.clone())), "other");
            assert!(node.lacking(&write, &BTreeMap::new()).is_ok());
            assert_eq!(node.sums().count, 4);
            (table.base, table.version) = (v(4, 7), v(5, 7));
            assert!(node.adopt(Arc::new(table)));
            assert!(node.lacking(&write, &BTreeMap::new()).is_err(), "in flight");
            assert_eq!(node.records.total().count, 0, "dropped");
        });
    }

    #[test]
    fn t2_lacking() {
        let it = play(4, "pass 0");
        let (record, mut stored) = it.there(0).with(|node| {
            let record = node.write(HASHES[0], Record::new(b"k0", "1"), &node::Context::default());
            let stored: BTreeMap<_, _> =
                (1..4).map(|it| (ADDRESSES[it].to_owned(), (node.incarnation_of(ADDRESSES[it]), node.version()))).collect();
            (record, stored)
        });
        it.play("kill 1, start 1, pass 2000");
        it.there(0).with(|node| {
            assert_eq!(node.lacking(&record, &stored), Ok(vec![ADDRESSES[1].to_owned()]), "incarnation");
            stored.values_mut().for_each(|it| it.1 = None);
            assert_eq!(node.lacking(&record, &stored).map(|it| it.len()), Ok(3), "version");
            node.give_up(&record, &[ADDRESSES[2].to_owned()]);
            assert!(node.lagging.contains_key(ADDRESSES[2]), "give up");
            assert!(node.lacking(&record, &stored).is_err(), "gave up");
        });
    }

    #[test]
    fn t4_past_life() {
        let it = play(2, "pass 0");
        let (taken, other) = it.there(1).with(|node| {
            let taken = node.compose(ADDRESSES[2], Message::Taken(0));
            (taken.clone(), Envelope { version: None, ..taken })
        });
        it.there(2).with(|node| {
            assert!(matches!(node.receive(taken.clone()), Reply::Whole(_)));
            assert!(matches!(node.receive(other), Reply::Refused), "version");
        });
        it.play("kill 1, start 1, pass 2000");
        it.there(2).with(|node| assert!(matches!(node.receive(taken), Reply::Refused), "past life"));
    }

    #[test]
    fn t5_waking() {
        let it = play(2, "sleep 0, pass 3000, cut 0-1 0-2 0-3, wake 0, pass 100");
        it.there(0).with(|node| assert_eq!(node.place(HASHES[1]), Place::Unknown, "waking"));
        it.play("pass 1500");
        it.there(0).with(|node| assert_eq!(node.place(HASHES[1]), Place::Here, "awake"));
        it.play("cut, sleep 0, pass 3000, wake 0, pass 400");
        it.there(0).with(|node| assert_eq!(node.place(HASHES[1]), Place::Here, "met"));
    }

    fn alone() -> Node {
        let view = names(&[3]);
        let mut node = Node::new(ADDRESSES[3].into(), view.clone(), 1, 5, Duration::from_secs(1000));
        node.adopt(Arc::new(Table::first(view, 1)));
        node
    }

    #[test]
    fn t6_joining() {
        let mut node = alone();
        assert_eq!(node.place(0), Place::Here);
        assert!(matches!(say(&mut node, 0, Message::Lock(v(2, 7))), Reply::Locked(_)));
        assert_eq!(node.place(0), Place::Unknown, "joining");
        let other = node::Status { version: Some(v(1, 7)), incarnation: 3, ..Default::default() };
        node.hear(ADDRESSES[0], &other);
        assert_eq!(node.place(0), Place::Unknown, "locked");
        let mut now = node.now;
        for _ in 0..11 { now += Duration::from_secs(1); node.look_at_clock(now); }
        node.hear(ADDRESSES[1], &other);
        assert_eq!(node.place(0), Place::Unknown, "from another");
        node.hear(ADDRESSES[0], &node::Status { version: Some(v(2, 7)), ..other.clone() });
        assert_eq!(node.place(0), Place::Unknown, "version");
        node.hear(ADDRESSES[0], &other);
        assert_eq!(node.place(0), Place::Here, "decided");
        // its own lock, or one with keys
        let mut node = alone();
        say(&mut node, 3, Message::Lock(v(2, 7)));
        assert_eq!(node.place(0), Place::Here, "own lock");
        let mut node = alone();
        let write = node.write(HASHES[0], Record::new(b"k0", "1"), &node::Context::default());
        assert!(node.lacking(&write, &BTreeMap::new()).is_ok());
        let table = Table { version: v(9, 9), ..Table::first(names(&[0, 3]), 1) };
        node.consider(ADDRESSES[0], Arc::new(table.clone()));
        assert_eq!(node.table().map(|it| it.view.len()), Some(1), "has keys");
        say(&mut node, 0, Message::Lock(v(2, 7)));
        assert_eq!(node.place(0), Place::Here, "has keys");
        let mut node = alone();
        node.consider(ADDRESSES[0], Arc::new(Table { version: v(9, 9), ..Table::first(names(&[0, 1]), 1) }));
        assert_eq!(node.table().map(|it| it.view.len()), Some(1), "does not list it");
        node.consider(ADDRESSES[0], Arc::new(table));
        assert_eq!(node.table().map(|it| it.view.len()), Some(2), "joins");
        node.consider(ADDRESSES[0], Arc::new(Table { version: v(10, 9), ..Table::first(names(&[0, 1, 3]), 1) }));
        assert_eq!(node.table().map(|it| it.view.len()), Some(2), "another store");
    }

    #[test]
    fn t7_let_in() {
        let table = Arc::new(Table { version: v(3, 9), ..Table::first(names(&[0, 1, 2, 3]), 2) });
        let status = |version| node::Status { version, ..Default::default() };
        let blank = || Node::new(ADDRESSES[0].into(), names(&[0, 1]), 2, 5, Duration::from_secs(1000));
        let answers = |them: &[(usize, node::Status)]| them.iter().map(|(it, s)| (ADDRESSES[*it].to_owned(), s.clone())).collect::<BTreeMap<_, _>>();
        let good = || status(Some(v(3, 9)));
        let mut node = blank();
        node.consider(ADDRESSES[2], Arc::new(Table { version: v(3, 9), ..Table::first(names(&[2, 3]), 2) }));
        assert_eq!(node.begin_round(), Some(names(&[1])), "a stranger's");
        node.consider(ADDRESSES[1], table.clone());
        node.consider(ADDRESSES[1], Arc::new(Table { version: v(2, 9), ..Table::first(names(&[0, 1, 4]), 2) }));
        assert_eq!(node.begin_round(), Some(names(&[1, 2, 3])), "newest");
        assert!(node.status().first_view.is_empty(), "has heard");
        node.hear(ADDRESSES[4], &good());
        assert_eq!(node.begin_round(), Some(names(&[1, 2, 3, 4])), "who goes by it");
        node.let_in(&answers(&[(1, good())]));
        assert!(node.table().is_none(), "majority");
        node.let_in(&answers(&[(1, good()), (2, node::Status { promised: v(4, 1), ..good() })]));
        assert!(node.table().is_none(), "promised");
        node.let_in(&answers(&[(1, good()), (2, status(None))]));
        assert!(node.table().is_some());
        let mut node = blank();
        node.consider(ADDRESSES[1], table.clone());
        node.let_in(&answers(&[(1, status(None)), (2, status(None))]));
        assert!(node.table().is_none(), "alive");
        assert_eq!(node.begin_round(), Some(names(&[1])), "alive");
        // The first table
        let first = |rounds, factor| node::Status { first_view: names(&[0, 1]), factor, rounds, ..Default::default() };
        let mut node = blank();
        node.let_in(&answers(&[(1, first(9, 2))]));
        assert!(node.table().is_none(), "own rounds");
        (0..9).for_each(|_| drop(node.begin_round()));
        for (what, them) in [("rounds", vec![(1, first(1, 2))]), ("differs", vec![(1, first(9, 1))]), ("heard", vec![(1, node::Status { first_view: vec![], ..first(9, 2) })]), ("all", vec![])] {
            node.let_in(&answers(&them));
            assert!(node.table().is_none(), "{what}");
        }
        node.let_in(&answers(&[(1, first(9, 2))]));
        assert!(node.table().is_some());
    }

    #[test]
    fn t8_begin_change() {
        let it = store_of_four(2);
        it.there(0).with(|node| {
            let view = names(&[0, 1, 2]);
            let mut begin = |node: &mut Node, force, least| {
                let begun = node.begin_change(&view, force, least).map(|it| (it.1.epoch, it.1.number));
                assert!(node.begin_change(&view, force, least).is_none(), "once");
                node.end_change();
                begun
            };
            assert_eq!(begin(node, false, v(5, 0)), Some((0, 6)), "least");
            say(node, 1, Message::Lock(v(8, 7)));
            assert_eq!(begin(node, false, v(5, 0)), Some((0, 9)), "promise");
            assert_eq!(begin(node, true, v(5, 0)), Some((1, 9)), "force");
            node.note_silent(ADDRESSES[1], true);
            assert_eq!(begin(node, false, v(5, 0)), Some((0, 9)), "silent stays");
            node.note_silent(ADDRESSES[3], true);
            assert_eq!(begin(node, false, v(5, 0)), Some((1, 9)), "silent leaves");
            assert_eq!(begin(node, false, Version { epoch: 1, ..v(9, 0) }), Some((1, 10)), "epoch once");
            let mut table = Table::clone(&node.table().expect("a table"));
            (table.base, table.version) = (table.version, v(9, 8));
            assert!(node.adopt(Arc::new(table)), "above the promise");
        });
    }

    #[test]
    fn t9_consider() {
        let left = || {
            let mut node = alone();
            node.adopt(Arc::new(Table { version: v(2, 9), ..Table::first(names(&[0, 1]), 1) }));
            node
        };
        let other = |view: &[usize]| Arc::new(Table { version: v(9, 9), ..Table::first(names(view), 1) });
        let size = |node: &Node| node.table().map(|it| it.view.len());
        let mut node = left();
        node.consider(ADDRESSES[4], other(&[0, 1, 2]));
        assert_eq!(size(&node), Some(2), "follow any");
        node.consider(ADDRESSES[0], other(&[0, 1, 2]));
        assert_eq!(size(&node), Some(3), "follow");
        let mut node = left();
        node.consider(ADDRESSES[4], other(&[0, 1, 3]));
        assert_eq!(size(&node), Some(3), "join left");
    }

    #[test]
    fn t10_hear() {
        let it = play(4, "pass 0");
        it.there(0).with(|node| {
            let before = node.status().stable_at;
            let status = node::Status { stable_at: vec![u64::MAX / 2; 4], version: Some(v(7, 7)), ..Default::default() };
            node.hear(ADDRESSES[1], &status);
            assert_eq!(node.status().stable_at[1..], before[1..], "stable same");
            let mut table = Table::clone(&node.table().expect("a table"));
            (table.base, table.version) = (table.version, v(2, 7));
            node.adopt(Arc::new(table));
            assert_eq!(node.status().stable_at, [0; 4], "stable anew");
            node.hear(ADDRESSES[1], &node::Status { settled: true, version: Some(v(2, 7)), incoming: vec!["a:1".into()], ..Default::default() });
            assert!(node.is_settled(), "settled");
            let ask = node.compose(ADDRESSES[0], Message::GiveKey(b"k0".to_vec().into()));
            let ask = Envelope { from: ADDRESSES[1].into(), incarnation: node.incarnation_of(ADDRESSES[1]), life: node.status().incarnation, ..ask };
            assert!(matches!(node.receive(ask.clone()), Reply::Key(_)));
            assert!(matches!(node.receive(Envelope { version: Some(v(1, 1)), ..ask }), Reply::Refused), "give key");
        });
    }

    fn old(key: &[u8]) -> node::Copied {
        let mut record = Record::new(key, "1");
        record.set_stamp(5);
        (record, node::Context::default())
    }

    #[test]
    fn t11_take() {
        let it = play(2, "pass 5000, cut 0-1, kill 1, start 1, pass 3000");
        it.there(2).with(|node| {
            assert!(!node.take(&old(b"new"), false) && !node.take(&old(b"new"), true), "old");
            let version = node.version().expect("a table");
            assert!(!node.take_reconciled(v(7, 7), ADDRESSES[3], &[], false), "version");
            assert!(node.lagging.is_empty());
        });
        it.there(1).with(|node| {
            assert!(!node.take(&old(b"k1"), false), "by pull");
            assert!(node.take(&old(b"k1"), true), "covers");
        });
        let it = play(4, "pass 5000");
        it.there(0).with(|node| {
            let (version, copy) = (node.version().expect("a table"), node.copy_of(&record(node, 0).cloned().expect("k0")));
            assert!(node.take_reconciled(version, ADDRESSES[1], &[copy.clone()], false));
            assert!(node.lagging.is_empty(), "news");
            let mut new = Record::new(b"k0", "7");
            new.set_stamp(copy.0.stamp() + (1 << 40));
            assert!(!node.take_reconciled(v(7, 7), ADDRESSES[1], &[(new.clone(), copy.1.clone())], false), "version");
            assert!(node.take_reconciled(version, ADDRESSES[1], &[(new, copy.1)], false));
            assert_eq!(node.lagging.keys().collect::<Vec<_>>(), [ADDRESSES[2], ADDRESSES[3]], "from");
            assert!(node.begin_to_reconcile(ADDRESSES[1]).is_none(), "does not lag");
            let failures = node.begin_to_reconcile(ADDRESSES[2]).expect("lags");
            assert!(node.begin_to_reconcile(ADDRESSES[2]).is_none(), "once");
            node.reconciled(ADDRESSES[2], v(7, 7), failures, true);
            assert!(node.lagging.contains_key(ADDRESSES[2]), "another version");
            node.note_silent(ADDRESSES[2], true);
            assert!(node.begin_to_reconcile(ADDRESSES[2]).is_none(), "silent");
            let mut status = node::Status { incarnation: node.incarnation_of(ADDRESSES[3]), is_ready: false, version: Some(version), ..Default::default() };
            node.hear(ADDRESSES[3], &status);
            assert!(node.begin_to_reconcile(ADDRESSES[3]).is_none(), "not ready");
            (status.is_ready, status.version) = (true, Some(v(7, 7)));
            node.hear(ADDRESSES[3], &status);
            assert!(node.begin_to_reconcile(ADDRESSES[3]).is_none(), "another table");
        });
    }

    #[test]
    fn t12_contexts() {
        let stamp = |node: &mut Node, who: &str, more: u64| ((node.status().clock >> 12) + more) << 12 | u64::from(node_of(hash_of(who.as_bytes())));
        let seen = |stamp: u64| node::Context { seen: [(node_of(stamp), stamp)].into(), table: None };
        // n2 and n3 lack what n0 and n1 had; n1 has not got it.
        let it = play(2, "pass 3000, cut 0-1 2-0 2-1 3-0 3-1, pass 1");
        it.there(0).with(|node| {
            let ask = seen(stamp(node, "nobody:1", 9));
            let needs = node.context_needs(HASHES[1], b"k1", &ask);
            assert_eq!(needs, Some(vec![names(&[1])]), "unknown writer");
            let of = seen(stamp(node, ADDRESSES[2], 5));
            let write = node.write(HASHES[1], Record::new(b"k1", "true"), &of);
            assert_eq!(node.copy_of(&write).1.seen.len(), 1, "copy");
            let after = node.context_after(&node::Context::default(), Some(&write));
            assert_eq!(after.seen.len(), 2, "merge");
            assert_eq!(after.table, None);
            let mut table = Table::clone(&node.table().expect("a table"));
            (table.base, table.version) = (table.version, v(2, 7));
            table.ranges.iter_mut().for_each(|it| it.sources = vec![names(&[2, 3])]);
            node.adopt(Arc::new(table));
            let ask = seen(stamp(node, ADDRESSES[2], 1000));
            assert_eq!(node.context_needs(HASHES[1], b"k1", &ask), Some(vec![names(&[2]), names(&[2, 3])]), "source, pulls");
            let write = node.write(HASHES[1], Record::new(b"k1", "true"), &node::Context::default());
            assert_eq!(node.copy_of(&write).1.table, Some(v(2, 7)), "write.table");
            assert_eq!(node.context_after(&node::Context::default(), None).table, Some(v(2, 7)), "ca.table");
            node.settle();
            assert!(node.incoming().is_empty(), "settle.pulls");
            let ask = seen(stamp(node, ADDRESSES[3], 1000));
            let needs = node.context_needs(HASHES[1], b"k1", &ask);
            assert_eq!(needs, Some(vec![]), "settled");
        });
    }

